"""The command `qllava`: one verb per function, in modules by purpose.

What a verb needs is imported inside it, so that `qllava --help` and a mistyped flag answer at once. With `--json` a
verb prints one JSON object and nothing else on stdout; whatever a library prints meanwhile goes to stderr. Exit status:
0 done, 1 something is wrong with the input or a verification failed, 2 the command line is wrong.

    qllava doctor
    qllava check train.json --image-folder images --model llava-hf/llava-1.5-7b-hf
    qllava inspect train.json --rows 3 --html samples.html
    qllava plan --config recipes/llava15_7b_8gb.yaml
    qllava merge runs/finetune_lora merged
    qllava export merged gguf --format gguf
    qllava chat nano --image photo.jpg --prompt "What is this?"
    qllava synthesize contexts.jsonl train.json --teacher a-model --base-url http://127.0.0.1:8000/v1
    qllava eval vqa merged questions.jsonl --json
    qllava filter captions.json balanced.json
"""

from __future__ import annotations

from collections.abc import Sequence

from qllava import __version__
from qllava.arguments import Parser, carry_out
from qllava.cli import concepts, evaluate, models, prepare, synthesize
from qllava.surroundings import prepare_process


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status (argparse itself ends a wrong one with status 2)."""
    prepare_process()
    arguments = _parser().parse_args(argv)
    return carry_out(arguments, arguments.run)


def _parser() -> Parser:
    parser = Parser(prog="qllava", description="Build, tune and use LLaVA on one consumer GPU.")
    parser.add_argument("--version", action="version", version=f"qllava {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (prepare, models, synthesize, concepts, evaluate):
        module.add(verbs)
    return parser
