"""The command line: ``python -m distilkernels`` says what runs here, ``capture`` and ``store`` make and look at stores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for an error (one line on stderr), 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m distilkernels", description="Without a command: versions, instruction set, and which backend serves what on this machine."
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_capture(commands)
    _add_store(commands)
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        from .support import print_support

        print_support()
        return 0
    from ..errors import StoreError

    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors", "tqdm"):
            raise
        print(f"error: this command needs {error.name}: pip install 'distilkernels[capture]'", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _add_capture(commands) -> None:
    parser = commands.add_parser(
        "capture",
        help="run a causal LM over texts or tokens and keep its top-k",
        description="Runs a transformers causal LM over documents and writes its top-k at every position to a store: row i is the "
        "prediction of token i + 1. Started again with the same arguments it continues where it was interrupted (Ctrl-C finishes the "
        "batch). Documents are sorted by length within a window, so their order in the store is not that of the files.",
    )
    parser.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="a transformers causal LM")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE|DIR", help=".txt, .jsonl, .npy or .safetensors, or folders of them")
    parser.add_argument("--out", required=True, metavar="STORE", help="folder of the store")
    parser.add_argument("--k", required=True, type=_positive, help="ids kept per token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the teacher's softmax (default 1)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model (default: the checkpoint's)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--batch-tokens", type=_positive, default=8192, help="tokens of a batch with its padding (default 8192)")
    parser.add_argument("--window", type=_positive, default=1024, help="documents sorted by length at a time (default 1024)")
    parser.add_argument("--max-length", type=_positive, help="documents are cut after as many tokens (default: the model's limit)")
    parser.add_argument("--limit", type=_positive, help="read no more than as many documents")
    parser.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="default: the model's")
    parser.add_argument("--per-line", action="store_true", help="every line of a .txt file is a document")
    parser.add_argument("--text-field", default="text", help='of .jsonl lines without "input_ids" (default text)')
    parser.add_argument("--id-field", default="id", help="of .jsonl lines; lines without it are named FILE:LINE (default id)")
    parser.add_argument("--flush-tokens", type=_positive, help="tokens of a shard: what a crash can lose")
    parser.add_argument("--overwrite", action="store_true", help="delete the store that is there instead of continuing it")
    parser.set_defaults(run=_capture)


def _add_store(commands) -> None:
    store = commands.add_parser("store", help="look at, check or merge stores", description="Looks at, checks or merges stores.")
    actions = store.add_subparsers(metavar="ACTION", required=True)
    for name, run, text in (
        ("info", _info, "what stores hold: documents, tokens, bytes per token, where they come from"),
        ("verify", _verify, "read every byte and compare checksums; exit status 1 where something is damaged"),
        ("merge", _merge, "copy the documents of several stores into a new one"),
    ):
        parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.add_argument("paths", nargs="+", metavar="PATH", help="folder of a store")
        if name == "merge":
            parser.add_argument("--out", required=True, metavar="STORE", help="folder of the new store")
        parser.set_defaults(run=run)


def _capture(options) -> int:
    from .capture import capture

    return capture(options)


def _info(options) -> int:
    from .stores import info

    return info(options.paths)


def _verify(options) -> int:
    from .stores import verify

    return verify(options.paths)


def _merge(options) -> int:
    from .stores import merge

    return merge(options.paths, options.out)
