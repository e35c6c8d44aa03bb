"""``kvote serve``: an OpenAI-compatible server in which the cache policy is a field of the request."""

import argparse
import importlib
import socket
from collections.abc import Sequence

from kvote.cli.load import load, quiet
from kvote.cli.plain import warn
from kvote.cli.subject import read_text
from kvote.env import memory
from kvote.errors import InputError
from kvote.library.library import Library

# Of the memory that is free once the model is loaded.
_FOR_CACHES, _FOR_DOCUMENTS, _FOR_PREFIXES = 0.5, 0.25, 0.125


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted. Raises InputError for a port that is taken, and keys that are none."""
    try:
        uvicorn = importlib.import_module("uvicorn")
        app = importlib.import_module("kvote.serve.app")
        service = importlib.import_module("kvote.serve.service")
        engine = importlib.import_module("kvote.serve.engine")
        documents = importlib.import_module("kvote.serve.documents")
        prefixes = importlib.import_module("kvote.serve.prefixes")
    except ImportError as error:
        raise InputError(f"The server needs {error.name}; install kvote[serve].") from error
    keys = [] if args.api_key_file is None else _keys(args.api_key_file)
    if not keys and args.host not in app.LOOPBACK:
        raise InputError(f"Anyone could use the server on {args.host}; give --api-key-file, or serve on 127.0.0.1.")
    listening = _listen(args.host, args.port)
    loaded = load(args.model)
    free = memory()[1] or 2**33
    limits = engine.Limits(
        rows=args.rows,
        queue=args.queue,
        chunk=args.chunk,
        context=args.context,
        nbytes=int(free * _FOR_CACHES) if args.cache_bytes is None else args.cache_bytes,
    )
    held = documents.Documents(int(free * _FOR_DOCUMENTS), args.documents)
    name = args.name or loaded.name
    size = int(free * _FOR_PREFIXES) if args.prefix_bytes is None else args.prefix_bytes
    library = Library(args.library, memory=size) if size or args.library is not None else None
    with quiet(bars=False):
        kept = library and prefixes.Prefixes(loaded.model, library, chunk=args.chunk, shares=args.share_prefixes)
        made = service.Service(name, loaded.model, loaded.tokenizer, args.method, limits, held, keys, kept)
    hosts = [*app.LOOPBACK, args.host, *args.allow_host]
    port = listening.getsockname()[1]
    warn(f"serving {name} on http://{args.host}:{port} (page at /, OpenAI interface at /v1)")
    config = uvicorn.Config(app.application(made, hosts=hosts), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])
    if library is not None:
        library.close()


def _keys(path: str) -> Sequence[str]:
    """A key per line. Raises InputError for a file without one."""
    keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not keys or any(len(key) < 8 for key in keys):
        raise InputError(f"{path} must have a key of at least 8 characters on each line.")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a port that is taken is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except OSError as error:
        raise InputError(f"Cannot serve on {host}:{port}: {error.strerror or error}.") from error
    return listening
