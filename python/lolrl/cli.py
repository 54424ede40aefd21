"""The command `lolrl`: verbs, flags, and failures as one line.

Exit codes: 0 done; 1 a stage failed; 2 the command line or configuration cannot be used; 130
interrupted. A failure prints one line on stderr; `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

VERBS = {
    "sft": "fine-tune a model on prompt and completion: the reference of the later stages",
    "annotate": "score data with the reference, fit the value head, compute advantages",
    "train": "train a policy from the reference by any objective (a_lol, nll, wbc, ...)",
    "evaluate": "measure a policy and its reference on held-out prompts",
    "demo": "the whole recipe on real movie reviews: fetches them once, about ten minutes",
    "plan": "how many tokens of training fit into a given memory, by formula",
    "env": "print versions, backends and device, for a bug report",
}

# The train extra, by the names that are imported: a plain install of lolkernels has none of them.
EXTRA = {
    "accelerate",
    "matplotlib",
    "numpy",
    "peft",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tqdm",
    "transformers",
    "vaderSentiment",
    "yaml",
}


class Parser(argparse.ArgumentParser):
    """Errors as one line on stderr, exit code 2."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {line}; see {self.prog} --help\n")


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the flags of `verb` alone: those of training need transformers."""
    parser = Parser(
        prog="lolrl",
        description="Offline RL of language models with a fused loss.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        usage = f"lolrl {name} [--config FILE] [flags]" if name != "env" else None
        sub = verbs.add_parser(name, help=text, description=text, usage=usage, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="print the traceback of a failure")
        if name == "env":
            sub.set_defaults(config=None)
            continue
        sub.add_argument(
            "--config", metavar="FILE", help="YAML with any of the flags; flags win over it"
        )
        if name == verb:
            _add_flags(sub, name)
    return parser


def _add_flags(sub: argparse.ArgumentParser, verb: str) -> None:
    from lolrl import options
    from lolrl.config import AnnotateConfig
    from lolrl.flags import add_config_flags, add_training_flags
    from lolrl.settings import DemoSettings

    classes: dict[str, type] = {
        "sft": options.SftOptions,
        "annotate": options.AnnotateOptions,
        "train": options.TrainOptions,
        "evaluate": options.EvaluateOptions,
        "demo": options.DemoOptions,
    }
    if verb == "plan":
        from lolrl import plan

        sub.description, sub.formatter_class = plan.__doc__, argparse.RawDescriptionHelpFormatter
        classes[verb] = plan.PlanOptions
    add_config_flags(sub, classes[verb])
    if verb in ("sft", "train"):
        add_training_flags(sub)
    elif verb == "annotate":
        add_config_flags(sub, AnnotateConfig)
    elif verb == "demo":
        add_config_flags(sub, DemoSettings)


def _share_cores() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has chosen.

    Spinning threads starve whatever shares their cores, themselves included: on two busy cores an
    update of the demo takes 0.9 to 2 s with them and 0.2 to 0.3 s without.
    """
    if "torch" not in sys.modules:  # read once, when torch loads its thread pool
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _quiet() -> None:
    """Our own lines and bars are the output: transformers keeps to errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What one version of transformers and peft tells the next is nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lolrl` with `argv` (default: the process's arguments); the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments if not a.startswith("-")), None)
    debug = "--debug" in arguments
    _share_cores()
    try:
        args = build_parser(verb).parse_args(arguments)
        return _run(args)
    except KeyboardInterrupt:
        print(f"lolrl {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and absent.partition(".")[0] in EXTRA:
            print(
                f"lolrl {verb}: {absent} is not installed: pip install 'lolkernels[train]'",
                file=sys.stderr,
            )
            return 2
        from lolrl.config import ConfigError

        cause = " ".join(str(error).split()) or "no message"
        if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            cause = f"{type(error).__name__}: {cause}"
        print(f"lolrl {verb}: {cause}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _run(args: argparse.Namespace) -> int:
    from lolrl import commands
    from lolrl.flags import merge

    _quiet()
    function = getattr(commands, f"run_{args.verb}")
    for line in function(merge(args)):
        print(line)
    leave()
    return 0


def leave() -> None:
    """Ends the process group of several ranks: one that exits while another talks to it aborts.

    A thread of gloo's takes the GIL to drop a tensor after its collective has ended. Where the
    interpreter ends meanwhile, the process aborts (torch 2.13; a sharded model keeps the group, and
    so its threads, beyond destroy_process_group).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()
