"""What ``kvote`` accepts. Each command names the module that runs it."""

import argparse
from functools import partial
from typing import Any, NoReturn

from kvote import __version__
from kvote.cli.given import budget, natural, number, port, positive
from kvote.errors import InputError

TOKENS = 65_536
METHOD = "tokenselect"
COMPARED = ("dense", "streamingllm", "random")
# What can be calibrated.
CALIBRATED = {
    "channels": "channels: key channels in the order of their weight in scores (doublesparsity)",
    "rotated": "rotated: key channels in an order for 2 bits, once rotated (rotatekv)",
    "razor": "razor: how key heads attend to what they have seen before (razorattention)",
    "duo": "duo: gates of key heads, trained (duoattention)",
    "semantic": "semantic: query heads that find answers, and what layers lose by keeping little (compresskv)",
    "patterns": "patterns: how query heads attend in prompts (minference)",
}
# Stands for a ``--compare`` without a value; no spec can be empty.
ALL = ""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and leaves the exit to ``main``."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses ``--model=--``, of which argparse makes a list of nothing."""
        given = super().parse_args(*args, **kwargs)
        for name, value in vars(given).items():
            if (value == [] and name not in ("compare", "allow_host")) or value == [[]]:
                self.error(f"--{name.replace('_', '-')}: expected one argument")
        return given

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="kvote", description="Ask long documents, with the KV cache under control.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"kvote {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    _ask(commands)
    _chat(commands)
    _read(commands)
    _info(commands)
    _methods(commands)
    _env(commands)
    _bench(commands)
    _will_it_help(commands)
    _calibrate(commands)
    _eval(commands)
    _train(commands)
    _serve(commands)
    return top


def _command(commands: "argparse._SubParsersAction[_Parser]", name: str, module: str, about: str) -> _Parser:
    command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False)
    command.set_defaults(module=f"kvote.cli.{module}")
    return command


def _ask(commands: "argparse._SubParsersAction[_Parser]") -> None:
    ask = _command(commands, "ask", "ask", "ask questions about a long document")
    _model(ask)
    ask.add_argument("--document", metavar="FILE", help="UTF-8 text, - for standard input (default: a built-in one)")
    ask.add_argument(
        "--question", metavar="Q", action="append", help="may be repeated (default: one about the built-in document)"
    )
    _method(ask)
    ask.add_argument(
        "--compare",
        metavar="SPEC",
        nargs="?",
        action="append",
        const=ALL,
        default=[],
        help=f"another method to run beside it, may be repeated; without SPEC: {', '.join(COMPARED)}",
    )
    ask.add_argument(
        "--question-first",
        action="store_true",
        help="read the document anew with each question, so that the method knows what is asked",
    )
    ask.add_argument(
        "--queries", metavar="TEXT", help="what will be asked: methods that drop tokens decide by it what stays"
    )
    ask.add_argument(
        "--tokens", metavar="N", type=positive, help=f"size of the built-in document (default: {TOKENS:,})"
    )
    ask.add_argument(
        "--library",
        metavar="DIR",
        help="a folder of what has been read: look there first, and leave there what is read",
    )
    ask.add_argument("--save", metavar="FILE", help="keep what was read in a file, for --load")
    ask.add_argument(
        "--load",
        metavar="FILE",
        help="answer from a file of `kvote read` or --save; with --document, that is read again if the file cannot be "
        "used",
    )
    _template(ask)
    _generation(ask)
    ask.add_argument(
        "--num-beams", metavar="N", type=positive, help="search with so many beams; the answer comes at its end"
    )
    ask.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the answer as it comes (default: on a terminal)",
    )
    shown = ask.add_mutually_exclusive_group()
    shown.add_argument("-q", "--quiet", action="store_true", help="print the answer alone")
    _json(shown)


def _chat(commands: "argparse._SubParsersAction[_Parser]") -> None:
    chat = _command(commands, "chat", "chat", "talk with a model, about a document or not")
    _model(chat)
    chat.add_argument("--document", metavar="FILE", help="UTF-8 text to talk about (default: none)")
    _method(chat)
    _template(chat)
    _generation(chat)
    chat.add_argument("-q", "--quiet", action="store_true", help="print answers alone")


def _model(command: _Parser) -> None:
    command.add_argument("--model", metavar="M", help="hub name, folder or GGUF file (default: the embedded model)")
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: as they are stored)",
    )
    command.add_argument("--device", metavar="D", default="cpu", help="such as cuda or cuda:1 (default: %(default)s)")
    command.add_argument("--load-in", choices=("int8", "int4"), help="round the weights to it, through torchao")


def _method(command: _Parser) -> None:
    command.add_argument(
        "--method",
        metavar="SPEC",
        default=METHOD,
        help="such as 'tokenselect(top_k=512)'; a bare name means the paper's defaults, or less where these read more "
        "tokens than the model was trained on (default: %(default)s)",
    )


def _template(command: _Parser) -> None:
    command.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    command.add_argument("--raw", action="store_true", help="go without the model's chat template")


def _generation(command: _Parser) -> None:
    command.add_argument(
        "--max-new-tokens", metavar="N", type=positive, help="(default: 256 in a chat template, 32 without one)"
    )
    command.add_argument("--temperature", metavar="T", type=number, help="above 0: sample (default: 0, the likeliest)")
    command.add_argument("--top-p", metavar="P", type=number, help="sample from the likeliest tokens that sum up to P")
    command.add_argument("--top-k", metavar="K", type=positive, help="sample from the K likeliest tokens")
    command.add_argument("--min-p", metavar="P", type=number, help="sample from those at least P times the likeliest")
    command.add_argument("--repetition-penalty", metavar="R", type=number, help="above 1: say less again")
    command.add_argument("--stop", metavar="TEXT", action="append", help="end the answer behind it; may be repeated")
    command.add_argument("--seed", metavar="N", type=natural, help="what is drawn when sampling")


def _read(commands: "argparse._SubParsersAction[_Parser]") -> None:
    read = _command(commands, "read", "read", "read a long document once, and keep what was read in a file")
    read.add_argument("document", metavar="BOOK", help="UTF-8 text, - for standard input")
    read.add_argument(
        "-o", "--out", metavar="FILE", required=True, help="where it goes; ask it with `kvote ask --load`"
    )
    _model(read)
    _method(read)
    _template(read)
    _json(read)


def _info(commands: "argparse._SubParsersAction[_Parser]") -> None:
    info = _command(
        commands, "info", "info", "tell what is in a saved file, and whether every byte is as it was written"
    )
    info.add_argument("file", metavar="FILE", help="what `kvote read`, cache.save or document.save has written")
    _json(info)


def _methods(commands: "argparse._SubParsersAction[_Parser]") -> None:
    methods = _command(
        commands, "methods", "methods", "list the methods, or tell all about one: parameters, source, partners, figures"
    )
    methods.add_argument("name", metavar="NAME", nargs="?", help="the method to tell about (default: list all)")
    methods.add_argument(
        "--table", action="store_true", help="print docs/methods.md instead: also which methods compose with which"
    )
    _json(methods)


def _env(commands: "argparse._SubParsersAction[_Parser]") -> None:
    _json(_command(commands, "env", "environment", "show versions, the machine and the kernels that run on it"))


def _bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    bench = _command(commands, "bench", "bench", "time every kernel on this machine, against torch's own attention")
    bench.add_argument(
        "--tokens",
        metavar="N",
        type=positive,
        nargs="+",
        help="tokens held, may be several (default: 131,072, fewer where memory is short)",
    )
    sizes = partial(bench.add_argument, metavar="N", type=positive)
    sizes("--heads", default=32, help="query heads (default: %(default)s, as in Llama-3.1-8B)")
    sizes("--kv-heads", default=8, help="key heads (default: %(default)s)")
    sizes("--head-dim", default=128, help="channels of a head (default: %(default)s)")
    _json(bench)


def _will_it_help(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _command(
        commands, "will-it-help", "will_it_help", "predict what a method gains on this machine, from a model's config"
    )
    command.add_argument(
        "--model", metavar="M", required=True, help="hub name, folder or config.json; no weights are read"
    )
    command.add_argument("--context", metavar="N", type=positive, required=True, help="tokens in the cache")
    command.add_argument(
        "--method",
        metavar="SPEC",
        default="tokenselect(sketch='int8')",
        help="such as 'tokenselect(top_k=512)' (default: %(default)s)",
    )
    command.add_argument(
        "--batch", metavar="B", type=positive, default=1, help="sequences at a time (default: %(default)s)"
    )
    _json(command)


def _calibrate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _command(
        commands, "calibrate", "calibrate", "measure once what some methods must know about a model, into a small file"
    )
    command.add_argument("--model", metavar="M", help="hub name or local folder (default: the embedded model)")
    command.add_argument("--what", choices=CALIBRATED, required=True, help="; ".join(CALIBRATED.values()))
    command.add_argument("--out", metavar="FILE", required=True, help="where the calibration goes, as JSON")
    command.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to calibrate with, - for standard input (default: documents and questions of the embedded "
        "model's language; other models need a text, except for razor, which reads random tokens)",
    )
    command.add_argument(
        "--tokens",
        metavar="N",
        type=positive,
        help="at most so many tokens of text: in all for channels and rotated (default: 131,072), of the one text that "
        "razor reads (default: 10,001), of the longest text for duo and semantic (default: 32,000 and 8,000); none "
        "longer than the model was made for",
    )
    command.add_argument(
        "--steps", metavar="N", type=positive, help="texts that duo trains with (default: 2,000; embedded model: 200)"
    )
    _json(command)


def _eval(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _command(
        commands,
        "eval",
        "eval",
        "measure methods on a model with tasks made on the spot, into a folder that can be resumed",
    )
    command.add_argument(
        "--model", metavar="M", help="hub name, local folder or GGUF file (default: the embedded model)"
    )
    command.add_argument("--out", metavar="DIR", help="where manifest and samples go, or are completed, and the report")
    command.add_argument("--report", metavar="DIR", help="only write DIR/report.html anew, of what was measured there")
    several = partial(command.add_argument, nargs="+")
    several("--methods", metavar="SPEC", help="measured beside the baselines, such as 'tokenselect(top_k=512)'")
    several("--tasks", metavar="TASK", help="(default: all in prose; the embedded model: those of its own language)")
    several("--files", metavar="FORMAT=PATH", help="tasks of LongBench, InfiniteBench, HELMET, SQuAD (docs/eval.md)")
    several("--lengths", metavar="N", type=positive, help="tokens of a document (default: 4,096; embedded: 2,048)")
    several("--budgets", metavar="B", type=budget, help="tokens kept or read, or a share up to 1, given to each method")
    command.add_argument("--samples", metavar="N", type=positive, default=10, help="of each (default: %(default)s)")
    command.add_argument("--seed", metavar="N", type=natural, default=0, help="decides the samples")
    command.add_argument(
        "--question-first",
        action="store_true",
        help="read the document anew with each question, so that the method knows what is asked",
    )
    command.add_argument(
        "--workers", metavar="N", type=positive, help="processes (default: 1; with --ray: one for each machine)"
    )
    command.add_argument(
        "--ray", metavar="ADDRESS", help="measure on the machines of this Ray cluster; auto: the one that runs here"
    )
    command.add_argument("--no-baselines", action="store_true", help="measure dense attention and --methods alone")
    command.add_argument("--raw", action="store_true", help="leave out the model's chat template")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the model's)")
    _json(command)


def _train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    train = _command(commands, "train-embedded", "train", "train the embedded model anew, or go on where it stopped")
    train.add_argument("--out-dir", metavar="DIR", required=True, help="where the model and its log go")
    # Only what is given is passed on; the defaults are those of kvote.models.train.train.
    count = partial(train.add_argument, default=argparse.SUPPRESS, metavar="N")
    count("--tokens", type=positive, help="length of the whole run in tokens")
    count("--seed", type=natural, help="decides weights and batches")
    train.add_argument(
        "--no-resume", dest="resume", action="store_false", default=argparse.SUPPRESS, help="ignore checkpoints"
    )
    train.add_argument(
        "--checkpoints",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="where the state for resuming goes (default: beside DIR)",
    )
    count("--checkpoint-seconds", type=positive, help="seconds between checkpoints")
    count("--log-every", type=positive, help="steps between lines of the log")
    count("--check-every", type=positive, help="steps between accuracy checks")
    count("--check-samples", type=natural, help="samples of a check, 0 for none")
    count("--stop-after", type=positive, help="end this run after so many steps of the whole")
    train.add_argument(
        "--no-progress", dest="progress", action="store_false", default=argparse.SUPPRESS, help="no progress bar"
    )


def _serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = _command(commands, "serve", "serve", "serve a model to OpenAI clients; requests name a cache policy")
    _model(serve)
    serve.add_argument("--name", metavar="NAME", help="what requests call the model (default: as --model)")
    serve.add_argument(
        "--method", metavar="SPEC", default="dense", help="for requests without kv_method (default: %(default)s)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="0 for any that is free (default: %(default)s)")
    serve.add_argument("--api-key-file", metavar="FILE", help="keys that clients must have one of, one per line")
    serve.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="host name of the server, may be repeated"
    )
    count = partial(serve.add_argument, metavar="N", type=positive)
    count("--rows", default=16, help="answers generated at a time (default: %(default)s)")
    count("--queue", default=256, help="requests that may wait (default: %(default)s)")
    count("--chunk", default=512, help="tokens of prompts read between two steps (default: %(default)s)")
    count("--context", default=131_072, help="tokens of a prompt and its answer (default: 131,072)")
    count("--cache-bytes", help="of all caches in use (default: half of the memory that is free)")
    count("--documents", default=100, help="documents held at a time (default: %(default)s)")
    serve.add_argument("--prefix-bytes", metavar="N", type=natural, help="of prompts for later ones (default: 1/8)")
    serve.add_argument("--library", metavar="DIR", help="a folder for prompts that no longer fit, and after the end")
    serve.add_argument("--share-prefixes", action="store_true", help="with other keys too: answers come sooner then")


def _json(command: "_Parser | argparse._MutuallyExclusiveGroup") -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
