"""Speed of chat.py's engine against transformers' `generate`, and of its server against `transformers serve`.

    pip install -r benchmarks/requirements.txt
    python benchmarks/bench_chat.py --out benchmarks/results/chat_cpu_2cores.json
    python benchmarks/bench_chat.py --model models/smollm2 --rounds 1 --requests 1 --only single first    # a model of yours
    python benchmarks/bench_chat.py --gpu-only --model models/smollm2                                     # one GPU, in bf16

All peers have the same weights: a Llama of 6 layers, 256 wide, with 32000 rows of logits, random, or --model. It is copied
(real weights are linked) with a plain template and without end tokens, so that every reply has the length that is asked for.
Decoding is greedy. The peers run alternately, `--rounds` times, each round with other texts; nothing is kept from one measurement
for the next but where that is what is measured. Servers that are not being measured are stopped (SIGSTOP).
    single-*     --requests prompts of --prompt tokens, one at a time, --tokens new tokens each: tokens per second
        engine                chat.Engine, in this process, driven as chat.py drives it
        generate              model.generate of the same model object
    batch-*      --concurrent prompts of 16 to 128 tokens with 16 to 192 new tokens, all at once: wanted tokens per second
        engine                chat.Engine, max_batch = --concurrent
        generate              one batch, padded on the left; it ends with its longest reply
        generate-each         a call for each prompt
    first-*      a new short turn after a conversation of --history tokens: milliseconds to its first token
        kept                  chat.Engine that has just written the last reply
        read                  chat.Engine with nothing kept
        generate              model.generate(max_new_tokens=1) of the whole conversation
    http-single-*, http-batch-*    the same prompts sent to servers (POST /v1/chat/completions, not streamed unless --stream)
        ours                  python chat.py --serve
        hf                    transformers serve
        hf-cb                 transformers serve --continuous-batching, 10 % of the free memory for its cache, not 90 %;
                              "did not run" and why is written down if it does not
A ratio is the median of the rounds' ratios: what disturbs the machine mostly disturbs both peers of a round.
Checked, or the benchmark ends: with one request at a time the engine and `generate` write the same tokens, and all three peers of
first-* the same first token (fp32); the servers read as many prompt tokens as the engine and write as many tokens as they are asked for.
same_replies counts the replies that agree with `generate` one by one (http: with our server's text); the padding of a batch changes
the rounding, so near ties may fall the other way there.
"""

import argparse
import atexit
import collections
import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import harness
import torch
import transformers

sys.path.insert(0, str(harness.ROOT))
import chat

PEERS = {"single": ["single-engine", "single-generate"],
         "batch": ["batch-engine", "batch-generate", "batch-generate-each"],
         "first": ["first-kept", "first-read", "first-generate"],
         "http": [f"http-{section}-{peer}" for section in ("single", "batch") for peer in ("ours", "hf", "hf-cb")]}
RATIOS = {  # name: (measure, peer, peer that it is divided by, what is wanted)
    "single_over_generate": ("tokens_per_sec", "single-engine", "single-generate", ">= 1.0"),
    "batch_over_generate": ("tokens_per_sec", "batch-engine", "batch-generate", ">= 1.2"),
    "batch_over_generate_each": ("tokens_per_sec", "batch-engine", "batch-generate-each", None),
    "first_kept_of_read": ("first_token_ms", "first-kept", "first-read", "<= 0.3"),
    "first_kept_of_generate": ("first_token_ms", "first-kept", "first-generate", None),
    "http_single_over_transformers": ("tokens_per_sec", "http-single-ours", "http-single-hf", ">= 1.0"),
    "http_single_over_continuous": ("tokens_per_sec", "http-single-ours", "http-single-hf-cb", None),
    "http_batch_over_transformers": ("tokens_per_sec", "http-batch-ours", "http-batch-hf", ">= 1.2"),
    "http_batch_over_continuous": ("tokens_per_sec", "http-batch-ours", "http-batch-hf-cb", None)}
VOCABULARY, POSITIONS = 32000, 2048
BATCH_PROMPTS, BATCH_REPLIES = (16, 128), (16, 192)  # shortest and longest [tokens]
LONGEST_WAIT = 600  # for a server's answer, or for its start [s]
_RNG = random.Random(0)
WORDS = ["".join(_RNG.choices("abcdefghijklmnoprstuvwyz", k=_RNG.randint(2, 9))) for _ in range(40000)]


def write_model(args, folder):
    """The model and its tokenizer, with a plain template and nothing that ends a reply."""
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder.mkdir()
    if args.model:
        source = pathlib.Path(args.model).resolve()
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, config.pad_token_id) if i is not None), 0)
        for file in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
            (folder / file.name).symlink_to(file)
    else:
        import tokenizers
        learnt = tokenizers.ByteLevelBPETokenizer()
        lines = [" ".join(WORDS[i: i + 100]) for i in range(0, len(WORDS), 100)]
        learnt.train_from_iterator(lines, vocab_size=VOCABULARY, min_frequency=1, special_tokens=["<|pad|>"], show_progress=False)
        tokenizer, pad = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, pad_token="<|pad|>"), 0
        config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.layers,
                             num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=POSITIONS, tie_word_embeddings=True)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    config.eos_token_id = config.bos_token_id = None
    config.save_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.chat_template = chat.FORMATS["turns"].replace("{bot}", "Assistant")
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(pad_token_id=pad).save_pretrained(folder)


class Job:
    """A prompt and how many tokens are wanted."""

    def __init__(self, prompts, messages, n_new):
        self.messages, self.ids, self.n_new = messages, prompts.ids(messages), n_new


def conversation(prompts, n_tokens, rng):
    """One user turn of random words, about so many tokens long with the template."""
    words = []
    while (missing := n_tokens - len(prompts.ids([{"role": "user", "content": " ".join(words)}]))) > 0:
        words += rng.choices(WORDS, k=max(1, missing // 8))
    return [{"role": "user", "content": " ".join(words)}]


class Bench:
    """The model, the engine and the servers; `run` measures one peer."""

    def __init__(self, args, folder):
        self.args, self.servers, self.n_runs, self.replies, self.histories = args, {}, collections.Counter(), {}, {}
        wanted = ["--model_path", str(folder), "--dtype", args.dtype, "--max_batch", str(args.concurrent), "--temperature", "0"]
        options = chat.parse_args(wanted)
        source, config, tokenizer, self.prompts, *_ = chat.prepare(options)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = chat.load(options, source, config, self.device)
        cuda = self.device.type == "cuda"  # as chat.main makes its engine
        memory = torch.cuda.mem_get_info()[0] if cuda else chat.common.device_memory() / 4
        self.engine = chat.Engine(self.model, tokenizer, self.prompts, self.device, args.concurrent, 2048 if cuda else 512, 0.8 * memory)
        if self.engine.stop_ids:
            sys.exit(f"tokens {self.engine.stop_ids} would end replies")
        self.engine.start()
        # `generate` has a thread of its own too, as in transformers' server: memory is allocated faster there than in the main thread
        self.caller = concurrent.futures.ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=[torch.get_num_threads()])
        self.settings = {name: getattr(options, name) for name in chat.SAMPLING}
        self.exact = self.model.dtype == torch.float32
        names = {name for peer in self.peers() if peer.startswith("http") for name in [peer.split("-", 2)[2]]}
        words = {"ours": [str(harness.ROOT / "chat.py"), *wanted, "--serve", "{port}"],
                 "hf": ["-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", "{port}", "--device",
                        self.device.type, "--dtype", {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[args.dtype]]}
        words["hf-cb"] = [*words["hf"], "--continuous-batching", "--cb-max-memory-percent", "0.1"]
        for name in words:
            if name in names:
                self.servers[name] = Server(words[name], "/healthz" if name == "ours" else "/health", folder.parent / f"{name}.log", args.threads)

    def peers(self):
        return [peer for section in self.args.only for peer in PEERS[section]]

    # what is asked

    def jobs(self, section, round_):
        args, rng = self.args, random.Random(f"{section} {round_}")
        if section == "single":
            lengths = [(args.prompt, args.tokens)] * args.requests
        else:  # the same lengths in every round
            fixed = random.Random(0)
            lengths = [(fixed.randint(*BATCH_PROMPTS), fixed.randint(*BATCH_REPLIES)) for _ in range(args.concurrent)]
        if round_ < 0:
            lengths = [(n_prompt, 4) for n_prompt, _ in lengths[: args.concurrent if section == "batch" else 1]]
        return [Job(self.prompts, conversation(self.prompts, n_prompt, rng), n_new) for n_prompt, n_new in lengths]

    def history(self, round_, i):
        """Messages of a conversation that ends with a reply (written by the engine) and of its next turn."""
        if (round_, i) not in self.histories:
            first = conversation(self.prompts, self.args.history - 16, random.Random(f"history {round_} {i}"))
            reply = self.ask_engine([Job(self.prompts, first, 16)])[1][0]
            after = [*first, {"role": "assistant", "content": reply["text"]}, {"role": "user", "content": "And then?"}]
            self.histories[round_, i] = Job(self.prompts, first, 16), Job(self.prompts, after, 1)
        return self.histories[round_, i]

    # who answers

    def rest(self):
        """Until the engine is idle: a conversation is kept just after its last event."""
        while self.engine.n_waiting() or self.engine.n_running() or self.engine.reading_requests:
            time.sleep(0.001)

    def forget(self):
        self.rest()
        self.engine.kept.clear()

    def request(self, job):
        return chat.new_request(self.prompts, job.ids, [0], {**self.settings, "max_new_tokens": job.n_new})

    def ask_engine(self, jobs, together=False):
        """(seconds, replies)"""
        requests = [self.request(job) for job in jobs]
        begin = time.perf_counter()
        if together:
            replies = [chat.collect(request)[0] for request in [self.engine.submit(request) for request in requests]]
        else:
            replies = [chat.collect(self.engine.submit(request))[0] for request in requests]
        return time.perf_counter() - begin, replies

    def generate(self, jobs):
        """New ids of each row of one batch, all as long as the longest wanted."""
        width = max(len(job.ids) for job in jobs)
        padded = [[0] * (width - len(job.ids)) + job.ids for job in jobs]
        mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]
        ids, mask = torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)
        made = self.caller.submit(self.model.generate, input_ids=ids, attention_mask=mask, max_new_tokens=max(job.n_new for job in jobs),
                                  do_sample=False)
        return made.result()[:, width:].tolist()

    def ask_server(self, server, job):
        """(text, prompt tokens, new tokens)"""
        body = {"messages": job.messages, "max_tokens": job.n_new, "temperature": 0}
        if self.args.stream:
            body.update(stream=True, stream_options={"include_usage": True})
        answer = server.post(body)
        if not self.args.stream:
            found = json.loads(answer)
            text, usage = found["choices"][0]["message"]["content"], found["usage"]
        else:
            events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
            if any("error" in event for event in events):
                raise RuntimeError(answer[-500:])
            text = "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices") or [])
            usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        return text, usage["prompt_tokens"], usage["completion_tokens"]

    # measuring

    def run(self, peer, warm_up=False):
        round_ = -1 if warm_up else self.n_runs[peer]
        self.n_runs[peer] += not warm_up
        section, name = peer.removeprefix("http-").split("-", 1)
        self.forget()
        if section == "first":
            return self.run_first(name, round_)
        jobs = self.jobs(section, round_)
        run = self.run_http if peer.startswith("http-") else self.run_here
        seconds, replies = run(section, name, jobs)
        same = self.replies.setdefault((peer.startswith("http-"), section, round_), {})
        same[name] = replies
        n_tokens = sum(job.n_new for job in jobs)
        found = {"tokens_per_sec": n_tokens / seconds, "seconds": seconds, "tokens": n_tokens, "prompt_tokens": sum(len(job.ids) for job in jobs),
                 "replies": len(jobs)}
        if section == "single" and len(same) == 2 and not peer.startswith("http-") and self.exact and same["engine"] != same["generate"]:
            sys.exit(f"engine and generate write other tokens: {same}")
        return found

    def run_here(self, section, name, jobs):
        if name == "engine":
            seconds, replies = self.ask_engine(jobs, together=section == "batch")
            return seconds, [[token for token, _ in reply["tokens"]] for reply in replies]
        begin = time.perf_counter()
        rows = self.generate(jobs) if name == "generate" and section == "batch" else [self.generate([job])[0] for job in jobs]
        return time.perf_counter() - begin, [row[: job.n_new] for row, job in zip(rows, jobs)]

    def run_http(self, section, name, jobs):
        with self.servers[name] as server, concurrent.futures.ThreadPoolExecutor(len(jobs) if section == "batch" else 1) as clients:
            begin = time.perf_counter()
            answers = list(clients.map(lambda job: self.ask_server(server, job), jobs))
            seconds = time.perf_counter() - begin
        for job, (_, n_prompt, n_new) in zip(jobs, answers):
            if (n_prompt, n_new) != (len(job.ids), job.n_new):
                raise RuntimeError(f"{name} read {n_prompt} and wrote {n_new} tokens, not {len(job.ids)} and {job.n_new}")
        return seconds, [text for text, *_ in answers]

    def run_first(self, name, round_):
        times, n_read = [], 0
        for i in range(self.args.requests if round_ >= 0 else 1):
            before, job = self.history(round_, i)
            self.forget()
            if name == "kept":
                self.ask_engine([before])
                self.rest()
            n_before, stamps, begin = self.engine.n_read, [], time.perf_counter()
            if name == "generate":
                tokens = self.generate([job])[0]
                stamps.append(time.perf_counter())
            else:
                request = self.engine.submit(self.request(job))

                def wait():
                    event = request.events.get()
                    stamps.append(time.perf_counter())
                    return event
                tokens = [token for token, _ in chat.collect(request, wait)[0]["tokens"]]
            n_read += self.engine.n_read - n_before if name != "generate" else len(job.ids)
            times.append(1000 * (stamps[0] - begin))
            if self.exact and tokens != self.replies.setdefault(("first", round_, i), tokens):
                sys.exit(f"first-{name} writes another first token")
        return {"first_token_ms": statistics.mean(times), "prompt_tokens": len(job.ids), "tokens_read": n_read / len(times)}

    def same_replies(self):
        """{peer: (replies that agree with the peer that is compared with, replies)} over all rounds."""
        counts = collections.defaultdict(lambda: [0, 0])
        for key, replies in self.replies.items():
            if len(key) == 3 and key[0] in (False, True) and key[2] >= 0:
                over_http, section, _ = key
                against = "ours" if over_http else "generate-each" if section == "batch" else "generate"
                for name, texts in replies.items():
                    if name != against and against in replies:
                        count = counts[("http-" if over_http else "") + f"{section}-{name}"]
                        count[0] += sum(a == b for a, b in zip(texts, replies[against]))
                        count[1] += len(texts)
        return dict(counts)


class Server:
    """A server in a process of its own; it runs inside `with` and is stopped (SIGSTOP) outside."""

    def __init__(self, words, health, log, threads):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, env = log, {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.process = subprocess.Popen([sys.executable, *(word.format(port=self.port) for word in words)], stdout=open(log, "w"),
                                        stderr=subprocess.STDOUT, env=env)
        atexit.register(self.stop)  # however the benchmark ends
        end = time.monotonic() + LONGEST_WAIT
        while True:
            try:
                if self.ask("GET", health)[0] == 200:
                    break
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{' '.join(words)} does not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        os.kill(self.process.pid, signal.SIGSTOP)

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_WAIT)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def post(self, body):
        status, answer = self.ask("POST", "/v1/chat/completions", json.dumps(body))
        if status != 200:
            raise RuntimeError(f"status {status}: {answer[-500:]}")
        return answer

    def __enter__(self):
        os.kill(self.process.pid, signal.SIGCONT)
        return self

    def __exit__(self, *_):
        os.kill(self.process.pid, signal.SIGSTOP)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            os.kill(self.process.pid, signal.SIGCONT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder of a decoder-only model; default: random weights")
    parser.add_argument("--width", type=int, default=256, help="of the random model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto = bf16 where there is a GPU, else fp32")
    parser.add_argument("--threads", type=int, help="of PyTorch, in every process; default: its own choice")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, one request at a time")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of it")
    parser.add_argument("--requests", type=int, default=4, help="of a round, one at a time; also conversations of first-*")
    parser.add_argument("--concurrent", type=int, default=16, help="requests at once")
    parser.add_argument("--history", type=int, default=1000, help="tokens of the conversation before the new turn")
    parser.add_argument("--stream", action="store_true", help="ask the servers for streams")
    harness.add_flags(parser)
    args = parser.parse_args()
    if harness.no_gpu(args):
        return
    if args.dtype == "auto":
        args.dtype = "bf16" if torch.cuda.is_available() else "fp32"
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "bench"
        write_model(args, folder)
        bench = Bench(args, folder)
        for peer in bench.peers():
            try:
                bench.run(peer, warm_up=True)
            except (RuntimeError, OSError, KeyError) as error:
                if not peer.endswith("-hf-cb"):
                    raise
                failed[peer] = f"{error}; its log ends: {bench.servers['hf-cb'].log.read_text()[-600:]}"
        results = harness.alternate([peer for peer in bench.peers() if peer not in failed], args.rounds, bench.run)
        bench.engine.stop()
    median, ratios, figures = harness.medians(results), {}, {"same_replies": bench.same_replies()}
    print("\n".join(f"median   {peer:<22}" + "  ".join(f"{k} {v:.4g}" for k, v in row.items()) for peer, row in median.items()))
    for name, (measure, peer, other, target) in RATIOS.items():
        if peer in median and other in median:
            ratios[name] = [a[measure] / b[measure] for a, b in zip(results[peer], results[other])]
            figures[name] = statistics.median(ratios[name])
            wanted = f"   wanted {target}" if target else ""
            print(f"{name:<32} {figures[name]:<8.3g} ({min(ratios[name]):.3g} to {max(ratios[name]):.3g}){wanted}")
    for peer, (n, of) in figures["same_replies"].items():
        print(f"same replies  {peer:<22}{n} of {of}")
    for peer, why in failed.items():
        print(f"{peer} did not run: {why}")
    harness.write_summary(args, results, ratios=ratios, did_not_run=failed, threads=torch.get_num_threads(), dtype=args.dtype,
                          targets={name: row[3] for name, row in RATIOS.items() if row[3]}, **figures)


if __name__ == "__main__":
    main()
