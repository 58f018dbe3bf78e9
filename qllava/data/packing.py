"""Packing of samples: a shared prefix is stored once, and packs are full. Pure functions on lengths and ids.

Samples about the same image(s) that begin with the same tokens become one group: the longest common prefix once
(it contains every image token), then the rest of each sample as a branch, whose positions continue from the prefix.
Two questions about an image of 4 tokens, and a text, in one pack:

    index         0    1 2 3 4  5  |  6     7  8  9   |  10     11  12  13  |  14  15  16
    token         <s>  P P P P  \\n |  What  ?  A  </s> |  Where  ?   B   </s> |  <s> Hi  </s>
    position      0    1 2 3 4  5  |  6     7  8  9   |  6      7   8   9   |  0   1   2
    group         0 ..................................................     |  1 ........
    branch        -             -  |  0               |  1                  |  0
    sees          before it        |  prefix and its own branch, before it  |  its own sample, before it
    shift_labels  -                |  -     A  </s> - |  -      B   </s> -  |  Hi </s> -

`shift_labels` are the labels of the next token of the same sample, so a branch predicts nothing of another one. A token
that predicts a learned one is never shared: if a branch would begin with a learned token (captions in `plain`), the
token before it is repeated in each branch, and if it is an image token, its feature too. For two captions:

    token         <s>  P P P  |  P  a  cat  \\n  |  P  two  cats  \\n
    position      0    1 2 3  |  4  5  6    7   |  4  5    6     7
    feature            0 1 2  |  3              |  3
    shift_labels  -           |  a  cat \\n  -   |  two cats \\n -

In shapes, S is the number of tokens in a pack, P of its image tokens, N of samples.

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
"""Number of groups that are searched for one that fits into a step."""


@dataclass(frozen=True)
class Group:
    """Position of a group of samples in a pack."""

    start: int
    """Index of the prefix in the pack."""
    prefix: int
    """Number of shared tokens; 0 for a sample alone."""
    branches: tuple[int, ...]
    """Number of tokens of each sample's rest; the rests follow the prefix one after the other."""

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.prefix + sum(self.branches)


@dataclass(frozen=True)
class Pack:
    """Tokens that the model computes as one sequence (see the module's docstring)."""

    input_ids: np.ndarray
    """(S,) token ids."""
    position_ids: np.ndarray
    """(S,) positions in the sample."""
    shift_labels: np.ndarray
    """(S,) labels of the next tokens."""
    image_places: np.ndarray
    """(P,) indices of the image tokens."""
    features: np.ndarray
    """(P,) feature at each image token, as an index into the concatenated features of `images`."""
    images: tuple[str, ...]
    """Paths of the distinct images of the pack."""
    groups: tuple[Group, ...]
    """Groups of samples in the pack."""
    ids: tuple[str, ...]
    """Ids of the samples, in the order of the branches."""


def shared_prefix(samples: Sequence[tuple[Sequence[int], Sequence[int]]], image_token_id: int) -> int:
    """Return how many leading tokens the samples can share.

    Learned tokens, and the token that predicts the first of them, are never shared.

    Args:
        samples: Pairs of input_ids and labels of samples that show the same images.
        image_token_id: Id of the `<image>` token.

    Returns:
        Length of the shared prefix in tokens; 0 if it would not contain all image tokens but the last.
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

    Args:
        samples: Samples as {"id", "input_ids", "labels", "image_files": paths of the images, "image_tokens": number of
            tokens of each image}.
        image_token_id: Id of the `<image>` token.
        share: Whether samples about the same images share their tokens.
    """
    return packs_of(samples, image_token_id, tokens_per_pack=None, share=share)[0]


def packs_of(
    samples: Sequence[dict[str, Any]], image_token_id: int, *, tokens_per_pack: int | None, share: bool = True
) -> list[Pack]:
    """Lay samples out in packs of at most `tokens_per_pack` tokens; None puts them into one pack.

    A longer group is split between branches, and its prefix repeated. A longer sample becomes a pack of its own.
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
        # A sample without images shares nothing: it is a group of its own.
        key = tuple(sample["image_files"]) if share and sample["image_files"] else ("", str(number))
        shown.setdefault(key, []).append(sample)
    return list(shown.values())


def _parts(
    members: list[dict[str, Any]], image_token_id: int, limit: int | None
) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return samples about the same images as groups (prefix, members) that are no longer than the limit."""
    prefix = shared_prefix([(m["input_ids"], m["labels"]) for m in members], image_token_id)
    if not prefix:
        return [(0, [member]) for member in members]
    if limit is None or prefix + _rest(members, prefix) <= limit:
        return [(prefix, members)]
    found = best_fit([_rest([member], prefix) for member in members], limit - prefix)
    return [(prefix if len(some) > 1 else 0, [members[k] for k in sorted(some)]) for some in found]


def _rest(members: Sequence[dict[str, Any]], prefix: int) -> int:
    """Return the number of tokens after the prefix, of all members."""
    return sum(len(member["input_ids"]) - prefix for member in members)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of indices: the largest size first, each into the fullest bin that has room, or into a new bin."""
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
    """Builder of a pack, to which groups are added."""

    def __init__(self, image_token_id: int, features: dict[str, range]) -> None:
        """Create an empty pack; `features` maps the path of an image to the indices of its features."""
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
        """Return the groups that were added as one pack."""
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
    """Yield the samples of each optimizer step of an epoch.

    Samples about the same images are in one step if they fit: groups are shuffled, and a step takes the next ones; a
    group that does not fit waits for the next step, and if none of the next groups fits, the first is split. The same
    seed and epoch give the same steps.

    Args:
        images: (N,) hash of each sample's images, 0 for none.
        samples_per_step: Number of samples in a step.
        seed: Seed of the order.
        epoch: Number of the epoch, which changes the order.
        share: Whether to keep samples about the same images together.

    Yields:
        (samples_per_step,) indices of samples; the last step may be shorter.
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
    """Split a step's samples into shares of equal size, or with one more in the first shares.

    Args:
        step: Indices of the samples, from `steps_of`.
        images: (N,) hash of each sample's images, 0 for none; samples about the same images stay together if they fit.
        count: Number of shares.

    Returns:
        Indices of each share; the last shares are empty if there are fewer samples than shares.
    """
    room = [len(step) // count + (number < len(step) % count) for number in range(count)]
    groups: dict[Any, list[int]] = {}
    for place, index in enumerate(step.tolist()):
        groups.setdefault(int(images[index]) or ("alone", index), []).append(place)
    shares: list[list[int]] = [[] for _ in room]
    for group in sorted(groups.values(), key=len, reverse=True):
        while group:
            fitting = [number for number in range(count) if room[number] >= len(group)]
            # The fullest share that has room; if none has, the emptiest takes a part of the group.
            best = min(fitting, key=room.__getitem__) if fitting else max(range(count), key=room.__getitem__)
            taken, group = group[: room[best]], group[room[best] :]
            shares[best] += taken
            room[best] -= len(taken)
    return [step[sorted(places)] for places in shares]


def _groups(images: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Return groups of samples about the same images, shuffled, and shuffled within; a text is a group of its own."""
    order = rng.permutation(len(images))
    alone = images[order] == 0
    # Images are identified by their first sample: with hashes of paths, moving a folder would change the order.
    _, first, of = np.unique(images, return_index=True, return_inverse=True)
    keys = first[of][order]
    by_key = np.argsort(keys[~alone], kind="stable")
    sorted_keys = keys[~alone][by_key]
    edges = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    groups = np.split(order[~alone][by_key], edges) if len(by_key) else []
    groups += [np.array([k]) for k in order[alone]]
    return [groups[k] for k in rng.permutation(len(groups))]
