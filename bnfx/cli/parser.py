"""The options of the command line, with help texts whose examples run as they stand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bnfx.cli import values
from bnfx.cli.checks import CHECKPOINTS, Takes
from bnfx.cli.command_line import Completion, Parser
from bnfx.version import __version__

_CODES = """\
exit codes:
  0  done, and verified where the command verifies
  1  verification or policy failed, or the ONNX file cannot be read
  2  usage: arguments that are wrong, files that are missing, inputs that do not fit
  3  the requested environment is missing: the CUDA provider, a package
  4  capture or export failed; files that were there are as they were
130  interrupted; 143 or 129 where SIGTERM or SIGHUP asked to end
"""

_MODEL = """\
MODEL is PACKAGE.MODULE:FACTORY, imported from the current directory or the installed packages and
called without arguments or with literal ones ('nets:resnet(depth=18)'); timm:NAME, torchvision:NAME
or transformers:NAME, with random weights unless the call asks for others
('timm:resnet18(pretrained=True)'); or a .pt2 file of torch.export.save. All are code: run those
that you trust.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command.

    Raises:
        SystemExit: They cannot be read, or help was asked for.
    """
    own = parser()
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        own.print_help(sys.stderr)
        own.exit(2)
    return own.parse_args(given)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    main_parser = Parser(
        prog="bnfx",
        description="Put BatchNorm into PyTorch networks, fold it away, export to ONNX, verify.",
        epilog=f"{_CODES}\n'bnfx COMMAND --help' shows the options of a command, and examples.",
    )
    main_parser.add_argument(
        "--print-completion",
        action=Completion,
        choices=("bash", "zsh"),
        help="print what makes this shell complete commands, options and files",
    )
    main_parser.add_argument("--version", action="version", version=f"bnfx {__version__}")
    commands = main_parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, (summary, examples, fill) in _COMMANDS.items():
        notes = "" if name == "doctor" else f"{_MODEL}\n"
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"{notes}examples:\n{examples}\n{_CODES}",
        )
        fill(command)
        _results(command)
    return main_parser


def _results(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("results")
    group.add_argument(
        "--json", metavar="FILE", help="write the report as JSON; - for standard output, alone"
    )
    group.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")
    group.add_argument("--html", metavar="FILE", help="write the report as one HTML file")
    loud = group.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="show the verdict alone")
    loud.add_argument(
        "-v", "--verbose", action="store_true", help="show every row, and the libraries' warnings"
    )


def _model(command: argparse.ArgumentParser, what: str = "the model") -> None:
    command.add_argument("model", metavar="MODEL", help=f"{what} (see below)")
    command.add_argument(
        "--checkpoint", metavar="FILE", help="state dict to load into it (.pt, .pth, .safetensors)"
    )
    command.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="where in it the state dict is, if not found",
    )


def _inputs(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("example inputs (a .pt2 file brings its own)")
    group.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="NAME:1x3x224x224[:DTYPE[:LOW..HIGH]] or FILE.npz; once for each input",
    )


def _dynamic(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dynamic-batch", action="store_true", help="axis 0 of every input is free"
    )
    command.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="NAME:AXIS=SYMBOL",
        help="this axis is free; equal symbols mean equal sizes",
    )


def _onnx(command: argparse.ArgumentParser) -> None:
    _dynamic(command)
    command.add_argument("--opset", type=int, metavar="N", help="18 or later")
    command.add_argument(
        "--output-name", action="append", metavar="NAME", help="once for each output, in order"
    )
    command.add_argument(
        "--external-data",
        action=argparse.BooleanOptionalAction,
        help="weights in FILE.data, or not; by default decided by size",
    )


#: Options of `fold_bn` by their names there, for every command that folds.
FOLDING = ("merge_branches", "thresholds", "border_maps", "merge_linear", "drop_dead", "block")


def _folding(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("folding")
    group.add_argument(
        "--no-merge-branches",
        dest="merge_branches",
        action="store_false",
        help="convolutions of one input that are added stay apart",
    )
    group.add_argument(
        "--no-merge-linear",
        dest="merge_linear",
        action="store_false",
        help="layers in sequence stay apart, also where one would cost less",
    )
    group.add_argument(
        "--drop-dead",
        action="store_true",
        help="channels that are zero or constant, or that nobody reads, leave; shapes change",
    )
    group.add_argument(
        "--block",
        type=values.width,
        default=16,
        metavar="N",
        help="numbers of channels count in multiples of it; 16 by default, as x86 computes",
    )
    group.add_argument(
        "--thresholds",
        action="store_true",
        help="bounds per channel may take a shift through a ReLU; may cost time",
    )
    group.add_argument(
        "--border-maps",
        action="store_true",
        help="constant maps may take a shift through zero padding; may cost time",
    )


def _form(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--form",
        choices=("graph", "module"),
        help=f"of the result: one graph, or the model's own class; {default} by default",
    )


#: What the file does to its first input, by the names that `deploy` has for it.
NORMALISING = ("input_scale", "input_mean", "input_std")


def _normalising(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("normalisation, taken into the file (one number, or C)")
    helps = (
        "what the first input is multiplied by, such as 1/255",
        "what is subtracted then",
        "what that is divided by",
    )
    for name, told in zip(NORMALISING, helps, strict=True):
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=values.numbers, metavar="X,X,X", help=told)


def _policy(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("policy (exit code 1 where it is broken)")
    group.add_argument(
        "--max-batch-norms-left", type=values.count, metavar="N", help="how many may stay at most"
    )
    group.add_argument(
        "--require-folded",
        dest="max_batch_norms_left",
        action="store_const",
        const=0,
        help="none may stay",
    )
    group.add_argument(
        "--survivors",
        dest="max_batch_norms_left",
        type=values.survivors,
        metavar="{batch_norm,error}",
        help="what becomes of those that cannot vanish: they stay, or that is an error",
    )


def _provider(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--provider",
        default="cpu",
        help="cpu, cuda, cuda:1, openvino, tensorrt, ... or the full name of one of onnxruntime; "
        "it never falls back",
    )
    command.add_argument(
        "--provider-option",
        action="append",
        default=[],
        type=values.option,
        metavar="KEY=VALUE",
        help="of the provider; library=PATH for one that is a plugin",
    )
    command.add_argument(
        "--allow-on-cpu",
        type=values.names,
        metavar="OP,OP",
        help="operators that may run on the CPU all the same; by default arithmetic of shapes",
    )


def _checks(command: argparse.ArgumentParser) -> None:
    _provider(command)
    _pooling(command)
    command.add_argument(
        "--batch-sizes",
        type=values.counts,
        metavar="N,N",
        help="to run as well, where the batch is free",
    )


def _precision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp32")


def _pooling(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--num-inputs", type=values.positive, default=8, metavar="N", help="to pool over"
    )
    _precision(command)
    command.add_argument(
        "--max-ratio",
        type=values.ratio,
        default=4.0,
        metavar="R",
        help="limit of error over budget",
    )


def _inspect(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(onnx=True))
    _model(command, "a model, or an .onnx file")
    _inputs(command)
    _folding(command)
    _policy(command)


def _insert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(writes=CHECKPOINTS))
    _model(command)
    command.add_argument(
        "file", nargs="?", metavar="FILE", help="state dict to write: .pt, .pth or .safetensors"
    )
    _inputs(command)
    _form(command, "module")
    group = command.add_argument_group("insertion")
    group.add_argument("--init", choices=("fresh", "identity", "calibrate"), default="fresh")
    group.add_argument(
        "--calibration",
        action="append",
        default=[],
        metavar="FILE.npz",
        help="one batch for --init calibrate; repeat it for more",
    )
    group.add_argument(
        "--placement", choices=("pre_activation", "post_activation"), default="pre_activation"
    )
    group.add_argument("--include", action="append", metavar="GLOB", help="layers to consider")
    group.add_argument("--exclude", action="append", metavar="GLOB", help="layers to leave alone")


def _fold(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(onnx=True, writes=(".pt2", *CHECKPOINTS), rewrites=(".onnx",)))
    _model(command, "the model, or an .onnx file")
    command.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="to write: .pt2 for torch.export.load, or a state dict (.pt, .pth, .safetensors); an "
        ".onnx file becomes one, verified first",
    )
    _inputs(command)
    _dynamic(command)
    _form(command, "graph")
    _folding(command)
    _policy(command)


def _export(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(inputs=True, writes=(".onnx",)))
    _model(command)
    command.add_argument("file", metavar="FILE", help="the .onnx file to write")
    _inputs(command)
    command.add_argument("--fold", action="store_true", help="fold the BatchNorms first")
    _folding(command)
    _onnx(command)


def _verify(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(onnx=True, inputs=True))
    _model(command, "the unfolded reference, or an .onnx file to compare with")
    command.add_argument("file", metavar="FILE", help="the .onnx file to check")
    _inputs(command)
    _checks(command)
    _policy(command)


def _prove(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(modules=False, onnx=True))
    _model(command, "an .onnx file")
    _inputs(command)
    _provider(command)
    _pooling(command)


def _deploy(command: argparse.ArgumentParser) -> None:
    command.set_defaults(
        takes=Takes(onnx=True, inputs=True, writes=(".onnx",), rewrites=(".onnx",))
    )
    _model(command, "the model, or an .onnx file")
    command.add_argument("file", metavar="FILE", help="the .onnx file to write once it has passed")
    _inputs(command)
    _form(command, "graph")
    _normalising(command)
    _folding(command)
    _onnx(command)
    _checks(command)
    command.add_argument(
        "--benchmark", action="store_true", help="measure it against the unfolded model too"
    )
    command.add_argument(
        "--tune",
        action="store_true",
        help="measure options of folding, keep the fastest that passes",
    )
    command.add_argument(
        "--bundle", metavar="DIR", help="after a failure, fill this folder with what reproduces it"
    )
    _policy(command)


def _bench(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=Takes(onnx=True, inputs=True))
    _model(command, "an .onnx file, or a model, which is exported unfolded and folded")
    command.add_argument("--baseline", metavar="FILE", help="an .onnx file to measure in turns")
    _inputs(command)
    _folding(command)
    _provider(command)
    _precision(command)
    command.add_argument(
        "--num-runs", type=values.runs, default=100, metavar="N", help="50 or more"
    )
    command.add_argument(
        "--num-threads",
        type=values.count,
        default=1,
        metavar="N",
        help="of an operator; 0: all that fit",
    )


def _doctor(command: argparse.ArgumentParser) -> None:
    command.set_defaults(takes=None)
    command.add_argument(
        "--require",
        action="append",
        default=[],
        type=values.provider_name,
        metavar="PROVIDER",
        help="exit code 3 where onnxruntime cannot run a node on it",
    )


#: Command -> summary, examples, and what adds its options.
_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "inspect": (
        "list the BatchNorms of a model or an .onnx file, and where they can go",
        """\
  bnfx inspect nets:small
  bnfx inspect nets:small --input x:1x3x16x16 --json -
""",
        _inspect,
    ),
    "insert": (
        "put BatchNorm between affine layers and the nonlinearities they feed",
        """\
  bnfx insert nets:plain
  bnfx insert nets:plain plain-bn.pt --input x:1x3x16x16 --init identity
""",
        _insert,
    ),
    "fold": (
        "fold every provable BatchNorm into the layers around it",
        """\
  bnfx fold nets:small --require-folded
  bnfx fold nets:small small.pt2 --input x:1x3x16x16 --html fold.html
  bnfx fold 'nets:small(width=4)' small.safetensors --form module
  bnfx export nets:small unfolded.onnx --input x:1x3x16x16
  bnfx fold unfolded.onnx folded.onnx
""",
        _fold,
    ),
    "export": (
        "write a model as ONNX",
        """\
  bnfx export nets:small unfolded.onnx --input x:1x3x16x16
  bnfx export nets:small small.onnx --fold --input x:1x3x16x16 --dynamic-batch
""",
        _export,
    ),
    "verify": (
        "check an .onnx file against the unfolded model that it was made from",
        """\
  bnfx export nets:small small.onnx --fold --input x:1x3x16x16 --dynamic-batch
  bnfx verify nets:small small.onnx --input x:1x3x16x16
  bnfx verify nets:small small.onnx --input x:1x3x16x16 --batch-sizes 1,4 --json report.json
  bnfx export nets:small unfolded.onnx --input x:1x3x16x16 --dynamic-batch
  bnfx verify unfolded.onnx small.onnx
""",
        _verify,
    ),
    "prove": (
        "prove that an .onnx file ran on a provider, node by node, and computed what it must",
        """\
  bnfx export nets:small small.onnx --fold --input x:1x3x16x16 --dynamic-batch
  bnfx prove small.onnx
  bnfx prove small.onnx --input x:4x3x16x16 --html proof.html
""",
        _prove,
    ),
    "deploy": (
        "fold, export, verify, and only then move the .onnx file into place",
        """\
  bnfx deploy nets:small small.onnx --input x:1x3x16x16 --dynamic-batch --require-folded
  bnfx deploy nets:small small.onnx --input x:1x3x16x16 --html deploy.html --json deploy.json
  bnfx deploy nets:small small.onnx --input x:1x3x16x16:uint8 --input-scale 1/255
  bnfx deploy nets:small small.onnx --input x:1x3x16x16 --tune
""",
        _deploy,
    ),
    "bench": (
        "measure the latency of .onnx files, interleaved",
        """\
  bnfx export nets:small unfolded.onnx --input x:1x3x16x16
  bnfx export nets:small small.onnx --fold --input x:1x3x16x16
  bnfx bench small.onnx --baseline unfolded.onnx
  bnfx bench nets:small --input x:1x3x16x16 --html bench.html
""",
        _bench,
    ),
    "doctor": (
        "tell whether this environment can do the work, and what to do where it cannot",
        """\
  bnfx doctor --require cpu
""",
        _doctor,
    ),
}
