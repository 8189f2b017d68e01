"""The verb `serve`: answer requests to every stage of runs, by HTTP, and a page that asks them all."""

from collections.abc import Sequence
from pathlib import Path

from llm3.cli.serve_checks import is_loopback, key_of
from llm3.distributed import compiled
from llm3.errors import counted
from llm3.serve import page
from llm3.serve.api import create_app
from llm3.serve.engine import Engine
from llm3.serve.guard import LOOPBACK
from llm3.serve.server import address_of, bind, run
from llm3.serve.service import Service
from llm3.serve.stages import open_stages


def serve(
    workdirs: Sequence[Path],
    stages: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    batch_size: int = 8,
    queue: int = 256,
    max_length: int | None = None,
) -> int:
    """Serve until SIGTERM or Ctrl-C, then answer what has begun. Raises UserError.

    stages: their names among those of all runs; None: all. batch_size: answers that are decoded at once. queue: the
    most requests that wait. max_length: tokens of a prompt with its answer.
    """
    bound = bind(host, port)
    with bound, compiled.kept_in(workdirs[0]):
        served = open_stages(workdirs, stages or ())
        engine = Engine(batch_size, queue)
        hosts = (*LOOPBACK, *({host.lower()} - {*LOOPBACK})) if is_loopback(host) else ()
        service = Service(served, engine, max_length)
        app = create_app(service, hosts=hosts, key=key_of(api_key), routes=page.routes(service))
        text = f"{counted(len(served), 'model')} at {address_of(bound)}\nOpen it in a browser to ask every stage"
        run(app, engine, bound, lambda: print(text, flush=True))
    return 0
