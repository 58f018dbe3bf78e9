"""Votes: a file that loses nothing, pairs on drawn sides, and what counts as a vote."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.inference import Chat
from qllava.voting.duel import Duel, contenders
from qllava.voting.votes import Vote, VoteFile, read_votes, tally
from tests.tiny_models import make_image, make_tiny_model, make_tiny_processor

VOTE = Vote(
    id="1",
    time="2026-11-23T12:00:00+00:00",
    question="What?",
    pictures=("ab",),
    conversation=({"role": "user", "content": "<image>\nWhat?"},),
    answers={"left": "Red.\nVery.", "right": "Blau, größer"},
    models={"left": "a", "right": "b"},
    vote="left",
    rater="anna",
    seed=3,
)


@pytest.fixture(scope="module")
def chats() -> tuple[Chat, Chat]:
    processor = make_tiny_processor()
    first, second = (Chat(make_tiny_model(processor, seed=seed), processor, f"tiny{seed}") for seed in (0, 1))
    return first, second


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "deep" / "votes.jsonl")
    file.append(VOTE)
    file.append(replace(VOTE, id="2", vote="both_bad"))
    assert read_votes(tmp_path / "deep" / "votes.jsonl") == file.votes == [VOTE, replace(VOTE, id="2", vote="both_bad")]
    assert VoteFile(tmp_path / "deep" / "votes.jsonl").votes == file.votes


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_last_line_is_cut_off_and_nothing_else(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "votes.jsonl"
    VoteFile(path).append(VOTE)
    VoteFile(path).append(replace(VOTE, id="2"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    file = VoteFile(path)
    assert [vote.id for vote in file.votes] == (["1", "2"] if cut == 1 else ["1"])  # only the line break was lost
    file.append(replace(VOTE, id="3"))
    assert [vote.id for vote in read_votes(path)][-1] == "3"


def test_a_line_in_the_middle_that_is_no_vote_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    VoteFile(path).append(VOTE)
    path.write_text(path.read_text() + '{"id": "2"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"votes\.jsonl.*2"):
        VoteFile(path)


def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo")
    with pytest.raises(InputError, match="not a file of votes"):
        VoteFile(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "one\ntwo"
    with pytest.raises(InputError, match="is a folder"):
        VoteFile(tmp_path)


def test_a_vote_that_does_not_fit_on_the_disk_leaves_no_half_of_itself(tmp_path: Path) -> None:
    import resource

    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(VOTE)
    before = file.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 50, hard))
    try:
        with pytest.raises(InputError, match="could not be saved"):
            file.append(replace(VOTE, id="2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.stat().st_size == before and len(file.votes) == 1
    file.append(replace(VOTE, id="3"))
    assert [vote.id for vote in read_votes(file.path)] == ["1", "3"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        VoteFile(tmp_path / "file" / "votes.jsonl")


def test_every_vote_that_was_called_saved_survives_a_kill(tmp_path: Path) -> None:
    (tmp_path / "vote.py").write_text(
        "import sys, pathlib\n"
        "from qllava.voting.votes import Vote, VoteFile\n"
        "file = VoteFile(pathlib.Path('votes.jsonl'))\n"
        "sides = {'left': 'a' * 50_000, 'right': 'b'}\n"
        "for number in range(10**9):\n"
        "    file.append(Vote(id=f'{sys.argv[1]}-{number}', question='q', answers=sides, models=sides, vote='tie'))\n"
        "    print(f'{sys.argv[1]}-{number}', flush=True)\n"
    )
    saved: set[str] = set()
    for run in range(3):
        process = subprocess.Popen(
            [sys.executable, "vote.py", str(run)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert process.stdout is not None
        saved |= {process.stdout.readline().strip() for _ in range(20 + run)}
        process.send_signal(signal.SIGKILL)
        saved |= {line for line in process.stdout.read().splitlines() if line.count("-") == 1}
        process.stdout.close()
        process.wait()
    VoteFile(tmp_path / "votes.jsonl")  # the next start
    assert saved <= {vote.id for vote in read_votes(tmp_path / "votes.jsonl")} and len(saved) > 60


def test_sides_are_drawn_by_the_seed_and_both_come(chats: tuple[Chat, Chat]) -> None:
    pair = contenders(chats, (0.0, 0.0))
    lefts = [Duel(pair, seed).contenders["left"].name for seed in range(200)]
    assert lefts == [Duel(pair, seed).contenders["left"].name for seed in range(200)]
    assert 70 < lefts.count("tiny0") < 130


def test_each_side_answers_as_its_model_does(chats: tuple[Chat, Chat]) -> None:
    image = make_image("red")
    for seed in (0, 1, 2, 3):
        duel = Duel(contenders(chats, (0.0, 0.0)), seed)
        with pytest.raises(InputError, match="both answers are complete"):
            duel.vote("left", "anna")
        *_, (left, right) = duel.answer("What?", [image], hashes=["ab"], max_new_tokens=12)
        for said, side in ((left, duel.contenders["left"]), (right, duel.contenders["right"])):
            assert said == side.chat.answer(image, "What?", max_new_tokens=12)
        vote = duel.vote("tie", "anna")
        assert vote.answers == {"left": left, "right": right} and vote.pictures == ("ab",) and vote.seed == seed
        assert vote.models == {side: duel.contenders[side].name for side in ("left", "right")}
        with pytest.raises(InputError, match="already has a vote"):
            duel.vote("tie", "anna")


def test_a_pair_that_was_stopped_has_no_vote(chats: tuple[Chat, Chat]) -> None:
    duel = Duel(contenders(chats, (0.0, 0.0)), 0)
    growing = duel.answer("What?", [], max_new_tokens=200)
    next(growing)
    duel.stopped.set()
    list(growing)
    with pytest.raises(InputError, match="both answers are complete"):
        duel.vote("left", "anna")


def test_one_model_is_compared_at_two_temperatures_only(chats: tuple[Chat, Chat]) -> None:
    with pytest.raises(InputError, match="at the same temperature"):
        contenders((chats[0], chats[0]), (0.5, 0.5))
    names = [side.name for side in contenders((chats[0], chats[0]), (0.0, 0.5))]
    assert names == ["tiny0", "tiny0 (temperature 0.5)"]


def test_folders_of_one_name_are_told_apart(chats: tuple[Chat, Chat], tmp_path: Path) -> None:
    for run in ("a", "b"):
        (tmp_path / run / "merged").mkdir(parents=True)
    first, second = (replace(chats[0], name=str(tmp_path / run / "merged")) for run in ("a", "b"))
    assert [side.name for side in contenders((first, second), (0.0, 0.0))] == ["a/merged", "b/merged"]


def test_the_tally_counts_models_not_sides() -> None:
    turned = {"left": "b", "right": "a"}
    votes = [
        VOTE,  # a
        replace(VOTE, models=turned),  # b
        replace(VOTE, models=turned, vote="right"),  # a
        replace(VOTE, vote="tie"),
        replace(VOTE, vote="both_bad"),
        replace(VOTE, models={"left": "a", "right": "c"}),
    ]  # fmt: skip
    found = tally(votes, ("a", "b"))
    assert (found.wins, found.ties, found.both_bad) == ((2, 1), 1, 1)
