"""Ranks that fork from a process which has imported all scripts: importing would take each of them
8 seconds. That torchrun starts ranks is tested in test_runs.py and test_extend.py."""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from unittest import mock

import common

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["common", "clf", "project_grads", "rl_ppo", "seq2seq", "sft_causal", "ranks"]
    + ["matplotlib.figure", "setuptools"]  # which DeepSpeed and the curves need
)
OF_SERVER = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # or a fork could not use the GPUs


def run_all(module, runs, environment, output):
    """What a rank does: runs of a script, one after the other, as far as they leave with 0."""
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    script = importlib.import_module(module)

    def main(runs):
        for words in runs:
            try:
                code = script.main(script.parse_args(words))
            except SystemExit as stop:
                code = stop.code  # 0: a finished run
            if code:
                return code

    common.launch(main, runs)


class Ranks:
    """The processes of runs, with what tests ask of a Popen."""

    def __init__(self, runs, n_ranks, module):
        self.output = tempfile.NamedTemporaryFile("r")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]  # a free one
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(n_ranks)
        self.processes = []
        for rank in map(str, range(n_ranks)):
            of_rank = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            arguments = (module.__name__, runs, of_rank, self.output.name)
            process = FORKED.Process(target=run_all, args=arguments, daemon=True)
            with mock.patch.dict(os.environ, OF_SERVER, PYTHONPATH=os.pathsep.join(sys.path)):
                process.start()  # the first one starts the process from which all fork
            self.processes.append(process)

    def poll(self):
        """None, or the exit code. As torchrun does, it kills the others of one that fails."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
            return failed[0]
        return None if None in codes else 0

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)
