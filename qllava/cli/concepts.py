"""The verb `qllava filter`: captions balanced by the concepts in them."""

from __future__ import annotations

import argparse
import json

from qllava.arguments import check_data, check_written, file_path, looks
from qllava.cli.flags import Verbs, add_verb, html_flag, json_flag, positive, quietly


def add(verbs: Verbs) -> None:
    """Add `filter`."""
    verb = add_verb(
        verbs, "filter", run_filter, "balance captions by concept: keep rare concepts, sample frequent ones"
    )
    verb.add_argument(
        "captions", metavar="CAPTIONS.json", type=file_path, help="LLaVA JSON or JSONL, or examples with a caption"
    )
    verb.add_argument("out", metavar="OUT.json", type=file_path, help="JSON list of the examples that are kept")
    verb.add_argument(
        "--min-count",
        metavar="N",
        type=positive,
        default=3,
        help="ignore concepts with fewer than N captions (default: 3)",
    )
    verb.add_argument(
        "--max-per-concept",
        metavar="N",
        type=positive,
        default=100,
        help="sample at most N captions per concept (default: 100)",
    )
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="random seed for sampling (default: 0)")
    verb.add_argument(
        "--concepts",
        choices=("spacy", "simple"),
        help="how to find noun phrases (default: spacy if spacy and en_core_web_sm are installed, else simple)",
    )
    html_flag(verb, "tables and a plot")
    json_flag(verb)
    looks(verb, captions=check_data, out=check_written, html=check_written)


def run_filter(arguments: argparse.Namespace) -> int:
    """Run `qllava filter`: write the kept examples and print the distribution before and after."""
    from qllava.synthesis.balance import as_text
    from qllava.synthesis.filtering import filter_captions

    figures = quietly(
        lambda: filter_captions(
            arguments.captions,
            arguments.out,
            min_count=arguments.min_count,
            max_per_concept=arguments.max_per_concept,
            seed=arguments.seed,
            concepts=arguments.concepts,
            page=arguments.html,
        ),
        arguments.json,
    )
    print(json.dumps(figures.as_json()) if arguments.json else as_text(figures))
    return 0
