"""The command line. Each command imports what it needs when it is called, so that ``--help`` answers at once and the
core runs where an optional library is missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

from . import __version__
from .errors import ConfigError, HyperFlexisError

EPILOG = """\
examples:
  hyperflexis make-model models/tiny --size 20m        a small random model, made here, to try things with
  hyperflexis serve examples/quickstart.yaml           two engines behind one gateway
  hyperflexis bench examples/demo.yaml --url http://127.0.0.1:8080
  hyperflexis transfer bench --size 1GiB               how fast an instance starts here, on each way
  hyperflexis demo                                     HyperFlexis against round robin, with a report
  hyperflexis simulate examples/mixed.yaml --profile h100-llama-3.1-8b --instances 4 --loads 0.6:1.4:0.2 --report out
  hyperflexis plan examples/mixed.yaml --profile h100-llama-3.1-8b --target 0.95
"""


@dataclass(frozen=True, slots=True)
class Command:
    """``add_arguments`` and ``run`` import their module when called. A command without help is not listed."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fleet", type=Path, metavar="FLEET.yaml", help="the fleet file; see docs/configuration.md")
    parser.epilog = (
        "Ctrl-C or SIGTERM stops the gateways, then the instances, then the controller; twice kills at once."
    )


def _serve(args: argparse.Namespace) -> int:
    from .config import read_fleet
    from .serve import serve

    _run_async(serve(read_fleet(args.fleet)))
    return 0


def _drain_arguments(parser: argparse.ArgumentParser) -> None:
    from .drain import add_arguments

    add_arguments(parser)


def _drain(args: argparse.Namespace) -> int:
    from .drain import run

    return run(args)


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    from .scale import add_arguments

    add_arguments(parser)


def _scale(args: argparse.Namespace) -> int:
    from .scale import run

    return run(args)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    from .explain import add_arguments

    add_arguments(parser)


def _explain(args: argparse.Namespace) -> int:
    from .explain import main

    return main(args)


def _instance_arguments(parser: argparse.ArgumentParser) -> None:
    from .config import ENGINE_ARGS
    from .policy.catalog import STEPS

    parser.description = "One engine serving one copy of a model. `serve` starts these; by hand it is for experiments."
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINE_ARGS), default="torch", help="what computes (default: %(default)s)")
    add(
        "--model", type=Path, metavar="DIR", help="model directory, for engine torch, and for vllm to start a server of"
    )
    add("--url", metavar="URL", help="base URL of a running server, for engines openai and vllm")
    add("--api-key-env", metavar="VARIABLE", help="environment variable with that server's key")
    add(
        "--profile", metavar="NAME|FILE", help="latency profile: what engine emulated keeps to, elsewhere a first guess"
    )
    add("--name", metavar="MODEL", help="name of the model as clients call it (default: the directory's)")
    add("--id", default="instance-0", help="name of this instance (default: %(default)s)")
    add("--epoch", type=int, default=1, help="which launch of this instance it is (default: %(default)s)")
    add(
        "--listen",
        default="127.0.0.1:9000",
        metavar="ADDRESS",
        help="unix:PATH or HOST:PORT for gateways (default: %(default)s)",
    )
    add(
        "--kv-listen",
        metavar="ADDRESS",
        help="unix:PATH or HOST:PORT for other instances that go on with a request's KV (default: none)",
    )
    add(
        "--weights-listen",
        metavar="ADDRESS",
        help="the same for other instances that start with its weights (torch; default: none)",
    )
    add(
        "--standby",
        action="store_true",
        help="be ready but for the weights, and wait for the controller to say where to get them",
    )
    add(
        "--reclaim-s",
        type=float,
        default=30.0,
        metavar="S",
        help="SIGUSR1 says that its machine is gone after so many seconds: by then all streams have gone on elsewhere "
        "(default: %(default)g)",
    )
    add(
        "--label",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="where it is: host, rack or zone; near instances are linked first (default: host is this one's name)",
    )
    add("--controller", metavar="ADDRESS", help="unix:PATH or HOST:PORT of the fleet's controller (default: none)")
    add(
        "--step",
        choices=sorted(STEPS),
        default="hyperflexis",
        help="what runs in the next iteration (default: %(default)s)",
    )
    group = parser.add_argument_group("engine options", "as under models.NAME.args in the fleet file")
    engines_of: dict[str, list[str]] = {}
    for engine, options in ENGINE_ARGS.items():
        for name in options.model_fields:
            engines_of.setdefault(name, []).append(engine)
    for name, engines in engines_of.items():
        text = ENGINE_ARGS[engines[0]].model_fields[name].description or ""  # type: ignore[index]
        shown = f"{text.rstrip('.').replace('`', '')} ({', '.join(engines)})".replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"option_{name}", metavar="VALUE", help=shown)


def _instance(args: argparse.Namespace) -> int:
    from .instance import run

    _log_to_stderr()
    _run_async(run(args))
    return 0


def _controller_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("term", type=int)


def _controller(args: argparse.Namespace) -> int:
    from .controller import Controller
    from .runtime.server import serve_controller
    from .serve import load_resolved, server_config

    _log_to_stderr()
    server, controller = server_config(load_resolved(args.state_dir), args.state_dir, args.term)
    _run_async(serve_controller(server, Controller(controller)))
    return 0


def _gateway_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("index", type=int)


def _gateway(args: argparse.Namespace) -> int:
    from .gateway.server import serve as serve_gateway
    from .serve import gateway_config, load_resolved

    _log_to_stderr()
    _run_async(serve_gateway(gateway_config(load_resolved(args.state_dir), args.state_dir, args.index)))
    return 0


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("model")


def _copy(args: argparse.Namespace) -> int:
    from .host_copy import keep
    from .instance import fleet_token
    from .serve import copy_config, load_resolved

    _log_to_stderr()
    keep(copy_config(load_resolved(args.state_dir), args.state_dir, args.model), fleet_token())


def _make_model_arguments(parser: argparse.ArgumentParser) -> None:
    from . import make_model

    make_model.add_arguments(parser)


def _make_model(args: argparse.Namespace) -> int:
    from . import make_model

    return make_model.main(args)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from . import bench

    bench.add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from . import bench

    return bench.main(args)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from . import demo

    demo.add_arguments(parser)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    return demo.main(args)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    from . import calibrate

    calibrate.add_arguments(parser)


def _calibrate(args: argparse.Namespace) -> int:
    from . import calibrate

    return calibrate.main(args)


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    from . import simulate

    simulate.add_arguments(parser)


def _simulate(args: argparse.Namespace) -> int:
    from . import simulate

    return simulate.main(args)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from . import plan

    plan.add_arguments(parser)


def _plan(args: argparse.Namespace) -> int:
    from . import plan

    return plan.main(args)


def _transfer_arguments(parser: argparse.ArgumentParser) -> None:
    from . import transfer_bench

    transfer_bench.add_arguments(parser)


def _transfer(args: argparse.Namespace) -> int:
    from . import transfer_bench

    return transfer_bench.main(args)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(_: argparse.Namespace) -> int:
    print(f"hyperflexis {__version__}")
    return 0


def _config_docs(_: argparse.Namespace) -> int:
    from .config.docs import render

    print(render(), end="")
    return 0


COMMANDS: dict[str, Command] = {
    "serve": Command("start a fleet and keep it running", _serve_arguments, _serve),
    "drain": Command("empty an instance without losing a stream", _drain_arguments, _drain),
    "scale": Command("set how many instances a model has, or let it follow its requests", _scale_arguments, _scale),
    "explain": Command("say what became of a request, an instance or a model, and why", _explain_arguments, _explain),
    "instance": Command("run one engine", _instance_arguments, _instance),
    "make-model": Command(
        "make a small random model, to try things without a download", _make_model_arguments, _make_model
    ),
    "bench": Command("send a workload to a gateway and measure what was kept", _bench_arguments, _bench),
    "demo": Command("compare HyperFlexis with round robin on this machine", _demo_arguments, _demo),
    "calibrate": Command("fit a latency profile and say how far it is off", _calibrate_arguments, _calibrate),
    "simulate": Command(
        "predict what share of a workload's requests a fleet keeps on time, by policy and load",
        _simulate_arguments,
        _simulate,
    ),
    "plan": Command("find the smallest fleet that keeps a workload's promises", _plan_arguments, _plan),
    "transfer": Command("measure how fast a new instance has its weights", _transfer_arguments, _transfer),
    "version": Command("print the version", _no_arguments, _version),
    "config-docs": Command("", _no_arguments, _config_docs),
    "_controller": Command("", _controller_arguments, _controller),
    "_gateway": Command("", _gateway_arguments, _gateway),
    "_copy": Command("", _copy_arguments, _copy),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.exit(2, f"{self.prog}: {message}\nTry {self.prog} --help\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only ``command`` gets its arguments, since the others' modules need not be loaded."""
    parser = _Parser(
        prog="hyperflexis",
        description="Serve many LLM tasks, each request with its own latency promise, on the fewest accelerators.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hyperflexis {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, entry in COMMANDS.items():
        if entry.help:
            sub = subparsers.add_parser(name, help=entry.help, description=entry.help[0].upper() + entry.help[1:] + ".")
        elif name == command:
            sub = subparsers.add_parser(name)
        else:
            continue
        if name == command:
            entry.add_arguments(sub)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed run, 2 for a mistake to be corrected."""
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(argv)
        return COMMANDS[args.command].run(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except HyperFlexisError as error:
        print(f"hyperflexis: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has left.
        sys.stderr.close()
        return 1


def entry_point() -> Never:
    """The ``hyperflexis`` and ``hfx`` scripts."""
    sys.exit(main(sys.argv[1:]))


def _run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end, on uvloop where there is one."""
    import asyncio

    try:
        from uvloop import new_event_loop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
