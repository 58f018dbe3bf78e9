"""Samples -> packs: what samples share is there once, and packs are full. Pure functions on lengths and ids.

Samples about the same image(s) that begin with the same tokens become one group: the longest common prefix once
(every image token is in it), then the rest of each sample as a branch, whose positions go on from the prefix. Two
questions about an image of 4 tokens, and a text, in one pack:

    index         0    1 2 3 4  5  |  6     7  8  9   |  10     11  12  13  |  14  15  16
    token         <s>  P P P P  \\n |  What  ?  A  </s> |  Where  ?   B   </s> |  <s> Hi  </s>
    position      0    1 2 3 4  5  |  6     7  8  9   |  6      7   8   9   |  0   1   2
    group         0 ..................................................     |  1 ........
    branch        -             -  |  0               |  1                  |  0
    sees          before it        |  prefix and its own branch, before it  |  its own sample, before it
    shift_labels  -                |  -     A  </s> - |  -      B   </s> -  |  Hi </s> -

`shift_labels` are the labels of the next token of the same sample, so a branch predicts nothing of another one. What
predicts a learned token is never shared: where a branch would begin with a learned token (captions in `plain`), the
token before it is repeated in each branch, and if it is an image token, its feature too. For three captions:

    token         <s>  P P P  |  P  a  cat  \\n  |  P  two  cats  \\n
    position      0    1 2 3  |  4  5  6    7   |  4  5    6     7
    feature            0 1 2  |  3              |  3
    shift_labels  -           |  a  cat \\n  -   |  two cats \\n -

S tokens of a pack, N samples.

Packing is ours: TRL refuses to pack samples with images, cuts samples that are longer than a pack, and repeats what
samples share. Shared prefixes are ours too: in training neither TRL nor transformers computes them once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qllava.data.encode import IGNORE_INDEX

_WINDOW = 256
"""Groups among which the best fit for a step is looked for."""


@dataclass(frozen=True)
class Group:
    """Where the samples of a group are in a pack.

    start: of the prefix, an index into the pack.
    prefix: tokens that they share; 0 for a sample alone.
    branches: tokens of each one's rest, one after the other behind the prefix.
    """

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def end(self) -> int:
        """Behind the last token."""
        return self.start + self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Pack:
    """Tokens that go through the model at once; see the head of this file.

    input_ids, position_ids, shift_labels: (S,) each.
    image_places: (P,) where the image tokens stand.
    features: (P,) which feature is there: an index into the features of `images`, one image after the other.
    images: the distinct images of the pack.
    groups: who stands where.
    ids: of the samples, in the order of the branches.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    shift_labels: np.ndarray
    image_places: np.ndarray
    features: np.ndarray
    images: tuple[str, ...]
    groups: tuple[Group, ...]
    ids: tuple[str, ...]


def shared_prefix(samples: Sequence[tuple[Sequence[int], Sequence[int]]], image_token_id: int) -> int:
    """How many tokens samples (input_ids, labels) can share; 0 when that would not hold every image token but the last.

    Nothing that is learned is shared, nor the token before it, which predicts it.
    """
    if len(samples) < 2:
        return 0
    first = np.asarray(samples[0][0])
    length = len(first)
    for ids, labels in samples:
        learned = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        length = min(length, int(learned[0]) - 1 if len(learned) else len(ids))
        other = np.asarray(ids[:length])
        different = np.flatnonzero(other != first[: len(other)])
        length = min(length, len(other), int(different[0]) if len(different) else len(other))
    images = max(int((np.asarray(ids) == image_token_id).sum()) for ids, _ in samples)
    shared = int((first[:length] == image_token_id).sum())
    return length if length > 0 and shared >= max(images - 1, 0) else 0


def lay_out(samples: Sequence[dict[str, Any]], image_token_id: int, *, share: bool = True) -> Pack:
    """Lay samples out in one pack; those about the same images become a group.

    samples: {"id", "input_ids", "labels", "images": paths of its images, "image_tokens": how many each of them takes}
    """
    return packs_of(samples, image_token_id, tokens_per_pack=None, share=share)[0]


def packs_of(
    samples: Sequence[dict[str, Any]], image_token_id: int, *, tokens_per_pack: int | None, share: bool = True
) -> list[Pack]:
    """The same samples in packs of at most `tokens_per_pack` tokens; None: in one pack.

    A group that is longer is cut between branches, and its prefix repeated. A sample that is longer alone is a pack of
    its own.
    """
    parts = [
        part for members in _by_images(samples, share) for part in _parts(members, image_token_id, tokens_per_pack)
    ]
    packs = [parts]
    if tokens_per_pack is not None:
        sizes = [prefix + _rest(members, prefix) for prefix, members in parts]
        packs = [[parts[k] for k in sorted(pack)] for pack in best_fit(sizes, tokens_per_pack)]
    return [_pack(pack, image_token_id) for pack in packs]


def _by_images(samples: Sequence[dict[str, Any]], share: bool) -> list[list[dict[str, Any]]]:
    shown: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for number, sample in enumerate(samples):
        # A text shares no image: it is a group of its own, whatever else is in the pack.
        key = tuple(sample["image_files"]) if share and sample["image_files"] else ("", str(number))
        shown.setdefault(key, []).append(sample)
    return list(shown.values())


def _parts(
    members: list[dict[str, Any]], image_token_id: int, limit: int | None
) -> list[tuple[int, list[dict[str, Any]]]]:
    """Samples about the same images as groups (prefix, members) that are no longer than the limit."""
    prefix = shared_prefix([(m["input_ids"], m["labels"]) for m in members], image_token_id)
    if not prefix:
        return [(0, [member]) for member in members]
    if limit is None or prefix + _rest(members, prefix) <= limit:
        return [(prefix, members)]
    found = best_fit([_rest([member], prefix) for member in members], limit - prefix)
    return [(prefix if len(some) > 1 else 0, [members[k] for k in sorted(some)]) for some in found]


def _rest(members: Sequence[dict[str, Any]], prefix: int) -> int:
    """Tokens behind the prefix, of all members."""
    return sum(len(member["input_ids"]) - prefix for member in members)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices by bins: the largest first, each into the fullest bin that has room; one that fits nowhere is alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        fitting = [k for k, left in enumerate(room) if sizes[index] <= left]
        if fitting:
            best = min(fitting, key=lambda k: room[k])
            bins[best].append(index)
            room[best] -= sizes[index]
        else:
            bins.append([index])
            room.append(capacity - sizes[index])
    return bins


def _pack(parts: list[tuple[int, list[dict[str, Any]]]], image_token_id: int) -> Pack:
    tokens = {
        name: count
        for _, members in parts
        for m in members
        for name, count in zip(m["image_files"], m["image_tokens"], strict=True)
    }
    starts = np.cumsum([0, *tokens.values()]).tolist()
    builder = _Builder(image_token_id, dict(zip(tokens, map(range, starts, starts[1:]), strict=True)))
    for prefix, members in parts:
        builder.add(members, prefix)
    return builder.pack(tuple(tokens))


class _Builder:
    """A pack that grows by groups.

    features: which features are those of an image, by its path.
    """

    def __init__(self, image_token_id: int, features: dict[str, range]) -> None:
        self.image_token_id, self.features_of = image_token_id, features
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.features: list[np.ndarray] = []
        self.groups: list[Group] = []
        self.samples: list[str] = []
        self.length = 0

    def add(self, members: list[dict[str, Any]], prefix: int) -> None:
        """Append a group: the prefix of its first member, and the rest of each."""
        start = self.length
        if prefix:
            self._append(members[0], 0, prefix)
        for member in members:
            self._append(member, prefix, len(member["input_ids"]))
        lengths = tuple(len(member["input_ids"]) - prefix for member in members)
        self.groups.append(Group(start, prefix, lengths))
        self.samples += [str(member["id"]) for member in members]

    def _append(self, sample: dict[str, Any], start: int, end: int) -> None:
        ids = np.asarray(sample["input_ids"], dtype=np.int64)
        images = np.flatnonzero(ids == self.image_token_id)
        if len(images):
            of = np.concatenate([self.features_of[name] for name in sample["image_files"]])
            here = (images >= start) & (images < end)
            self.features.append(of[here])
        shifted = np.append(np.asarray(sample["labels"], dtype=np.int64)[1:], IGNORE_INDEX)[start:end]
        self.ids.append(ids[start:end])
        self.positions.append(np.arange(start, end))
        self.labels.append(shifted)
        self.length += end - start

    def pack(self, images: tuple[str, ...]) -> Pack:
        """What was appended, as one pack."""
        features = np.concatenate(self.features) if self.features else np.empty(0, dtype=np.int64)
        ids = np.concatenate(self.ids)
        return Pack(
            ids,
            np.concatenate(self.positions),
            np.concatenate(self.labels),
            np.flatnonzero(ids == self.image_token_id),
            features,
            images,
            tuple(self.groups),
            tuple(self.samples),
        )


def steps_of(
    images: np.ndarray, samples_per_step: int, *, seed: int, epoch: int, share: bool = True
) -> Iterator[np.ndarray]:
    """The samples of each optimizer step of an epoch, (samples_per_step,) indices each; the last may be shorter.

    images: (N,) a hash of each sample's images, 0 for none.

    Samples about the same images come in one step, as far as they fit: groups are shuffled, and a step takes the
    next ones; what its last place has no room for waits, and if nothing in sight fits, the next group is cut. The same
    seed and epoch give the same steps.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = _groups(images, rng) if share else [np.array([k]) for k in rng.permutation(len(images))]
    step: list[np.ndarray] = []
    room = samples_per_step
    waiting: list[np.ndarray] = []
    position = 0
    while position < len(groups) or waiting:
        while len(waiting) < _WINDOW and position < len(groups):
            waiting.append(groups[position])
            position += 1
        fitting = next((k for k, group in enumerate(waiting) if len(group) <= room), None)
        if fitting is None:
            group = waiting[0]
            step.append(group[:room])
            waiting[0] = group[room:]
        else:
            step.append(waiting.pop(fitting))
        room -= len(step[-1])
        if room == 0:
            yield np.concatenate(step)
            step, room = [], samples_per_step
    if step:
        yield np.concatenate(step)


def shares_of(step: np.ndarray, images: np.ndarray, count: int) -> list[np.ndarray]:
    """A step's samples in `count` shares of the same size, or one more in the first ones; indices as in `steps_of`.

    images: (N,) a hash of each sample's images, 0 for none; samples about the same ones stay together as far
    as they fit. Where there are fewer samples than shares, the last shares are empty.
    """
    room = [len(step) // count + (number < len(step) % count) for number in range(count)]
    groups: dict[Any, list[int]] = {}
    for place, index in enumerate(step.tolist()):
        groups.setdefault(int(images[index]) or ("alone", index), []).append(place)
    shares: list[list[int]] = [[] for _ in room]
    for group in sorted(groups.values(), key=len, reverse=True):
        while group:
            fitting = [number for number in range(count) if room[number] >= len(group)]
            # The fullest that has room; where none has, the emptiest takes what it can.
            best = min(fitting, key=room.__getitem__) if fitting else max(range(count), key=room.__getitem__)
            taken, group = group[: room[best]], group[room[best] :]
            shares[best] += taken
            room[best] -= len(taken)
    return [step[sorted(places)] for places in shares]


def _groups(images: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Samples by their images, in a shuffled order, and shuffled within; a text is a group of its own."""
    order = rng.permutation(len(images))
    alone = images[order] == 0
    # Images are known by the first sample about them: by hashes of paths, a folder that moves would change the order.
    _, first, of = np.unique(images, return_index=True, return_inverse=True)
    keys = first[of][order]
    by_key = np.argsort(keys[~alone], kind="stable")
    sorted_keys = keys[~alone][by_key]
    edges = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    groups = np.split(order[~alone][by_key], edges) if len(by_key) else []
    groups += [np.array([k]) for k in order[alone]]
    return [groups[k] for k in rng.permutation(len(groups))]
