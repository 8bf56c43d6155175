"""Serves a trained run over HTTP, with a demo page.

    python -m unified_mm.serve --run runs/first
    python -m unified_mm.serve --run runs/first --index runs/first-index --port 8080

The server listens on this machine only, unless --host says otherwise; then it requires a token. On
SIGTERM or Ctrl-C it accepts no new requests, finishes those in flight (for at most --drain_seconds)
and ends: exit code 0 if all were finished, 143 (or 130) if some were cut off.

It offers captions (streamed too), answers, embeddings, search, zero-shot classes and attention
maps: /docs lists the routes, /metrics is for Prometheus, and / is a page to find pictures by words,
and to drop one to caption it, ask about it, find its like, and see where attention lay at each
word. Uploads, pixels, texts, queues and times are limited, and a refusal says why in JSON. Beyond
loopback put a proxy in front: slow headers and the number of connections are not limited.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.interrupts import leave_at_end
from unified_mm.cli.messages import say


@command(
    "serve",
    __doc__,
    needs=("run",),
    takes=(
        "best",
        "index",
        "host",
        "port",
        "token_file",
        "allow_anyone",
        "slots",
        "queue",
        "upload_megabytes",
        "megapixels",
        "seconds",
        "drain_seconds",
    ),
)
def main(options: argparse.Namespace) -> int:
    """Loads the run, warms up, prints the address and serves until a signal.

    Raises:
      ValueError: if a package is missing, or a flag has a wrong value.
    """
    try:
        from unified_mm.serving.app import make_app
        from unified_mm.serving.server import DrainingServer, bind, url_of
    except ImportError as error:
        message = f"serving needs more packages: pip install 'unified_mm[serve]' ({error})"
        raise ValueError(message) from error
    from unified_mm.analysis.attention_maps import attention_over_patches
    from unified_mm.inference.loaded import load
    from unified_mm.search.search_index import SearchIndex
    from unified_mm.serving.gate import Traffic
    from unified_mm.serving.security import check_binding, read_token
    from unified_mm.serving.starting import running_service, warm_up

    token = read_token(options.token_file, os.environ)
    check_binding(options.host, token, options.allow_anyone)
    limits = limits_of(options)
    # What can be said about the address is said before a model is loaded.
    with closing(bind(options.host, options.port)) as bound:
        model = load(options.run, best=options.best)
        model.refuse_alone("served")
        which = "the best state, " * options.best
        say(f"{which}step {model.step} of {options.run}, fusion {model.config.model.fusion}")
        index = SearchIndex.open(options.index) if options.index else None
        if index is not None:
            index.check_model(model)
        with running_service(
            model,
            limits,
            index=index,
            attend=attention_over_patches,
            slots=options.slots,
            queue=options.queue,
        ) as service:
            for route, why in service.missing.items():
                say(f"without {route}: {why}")
            say("warms up: what requests need is compiled, for minutes the first time")
            say(f"warm after {warm_up(service):.1f} s")
            traffic = Traffic()
            app = make_app(service, traffic=traffic, token=token, host=options.host)
            server = DrainingServer(app, traffic, options.drain_seconds)
            bound.listen()  # who reads the line may ask at once
            say(f"serving at {url_of(bound)}" + (", with a token" if token else ""))
            server.run(sockets=[bound])
    say("stopped; some were cut off" if server.exit_code else "stopped; all were finished")
    leave_at_end(server.exit_code)  # it was a signal that ended it
    return server.exit_code


def limits_of(options: argparse.Namespace) -> Any:
    """Returns the limits that the options ask for.

    Raises:
      ValueError: if a limit is not above 0 and below 1e9.
    """
    from unified_mm.serving.limits import Limits

    for name in ("upload_megabytes", "megapixels", "seconds", "drain_seconds", "slots", "queue"):
        value = getattr(options, name)
        if not 0 < value < 1e9:  # so that NaN is refused too
            raise ValueError(f"--{name}={value}: must be above 0 and below 1e9")
    return Limits(
        upload_bytes=int(options.upload_megabytes * 1e6),
        pixels=int(options.megapixels * 1e6),
        waiting=options.queue,
        requests=2 * options.queue,
        seconds=options.seconds,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
