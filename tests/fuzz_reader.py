# SPDX-License-Identifier: Apache-2.0
"""Drives the readers of deltas and fusions with damaged files, in memory: `python tests/fuzz_reader.py CASES SEED`.

Every case must end in success or FormatError. Runs under a memory limit (address space of the imports plus 384 MiB) and
a time limit of five seconds a case; prints a JSON summary.
"""

import copy
import hashlib
import json
import math
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from deltaweave.formats import Delta, FormatError, parse_fusion, write_fusion
from fusions import make_fusion
from samples import pack_file, sample_bytes, split_file

EXTRA_MEMORY = 384 << 20
CASE_SECONDS = 5
LARGEST_PRODUCT = 1 << 20
NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 65537, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308]
WORDS = ["", "x", "../../etc/passwd", "a/b", "\u0000", "\ud800", "é" * 50, "16", "F16", "U8", "BF16", "I64"]
KINDS = ["factored", "dense", "rows", "replace", "base", "codebook"]
LISTS = [[], {}, [0], [[]], [1, 2, 3], [-1, 5], {"a": 1}, [2**40, 2**40], [0, 2**62]]
HOSTILE = [*NUMBERS, *WORDS, *KINDS, *LISTS, None, True, False]
DEEP = ["[" * 3000 + "]" * 3000, '{"a":' * 2000 + "1" + "}" * 2000]
TEXTS = [
    *DEEP,
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "\x00",
    '{"k":1,"k":2}',
    "'",
    "-",
    "\ufeff",
]
HALVES = [b"\x00\x7c", b"\x00\x7e", b"\xff\xff"]
SINGLES = [b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f"]


def places(value, path=()):
    """Paths of all values inside parsed JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def altered(value, chance):
    """A copy with one to three values replaced, removed, renamed or duplicated."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        path = chance.choice([path for path in places(value) if path] or [()])
        if not path:
            return copy.deepcopy(chance.choice(HOSTILE))
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        action, key = chance.random(), path[-1]
        if action < 0.65:
            owner[key] = copy.deepcopy(chance.choice(HOSTILE))
        elif action < 0.8:
            del owner[key]
        elif isinstance(owner, dict):
            owner[chance.choice(["unknown", key + "x", "../x", ""])] = owner[key]
        elif isinstance(owner[key], int):
            owner[key] += chance.choice([-1, 1, 16, 256])
    return value


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def flip_anywhere(data, chance):
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def flip_header(data, chance):
    damaged = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(chance.choice([1, 2, 4])):
        damaged[chance.randrange(8 + length)] = chance.randrange(256)
    return bytes(damaged)


def lie_about_length(data, chance):
    length = chance.choice([0, 1, 7, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, chance.randrange(len(data))])
    return struct.pack("<Q", length) + data[8:]


def alter_outer(data, chance):
    outer, _, section = split_file(data)
    if chance.random() < 0.5:
        return pack_file(altered(outer, chance), None, section)
    name = chance.choice(sorted(outer))
    return pack_file({**outer, name: altered(outer[name], chance)}, None, section)


def alter_inner(data, chance):
    outer, inner, section = split_file(data)
    return pack_file(outer, altered(inner, chance), section)


def alter_record(data, chance):
    outer, inner, section = split_file(data)
    name = chance.choice(sorted(inner["records"]))
    inner["records"][name] = altered(inner["records"][name], chance)
    return pack_file(outer, inner, section)


def alter_text(data, chance):
    outer, inner, section = split_file(data)
    text = json.dumps(inner)
    at = chance.randrange(len(text))
    return pack_file(outer, text[:at] + chance.choice(TEXTS) + text[at + chance.choice([0, 1, 8]) :], section)


def move_tensor(data, chance):
    """Overlaps, holes, swapped and shifted tensors."""
    outer, inner, section = split_file(data)
    one, two = chance.sample([name for name in outer if name != "__metadata__"], 2)
    action = chance.randrange(4)
    if action == 0:
        outer[one]["data_offsets"], outer[two]["data_offsets"] = outer[two]["data_offsets"], outer[one]["data_offsets"]
    elif action == 1:
        outer[one]["data_offsets"] = outer[two]["data_offsets"]
    elif action == 2:
        shift = chance.choice([-256, -1, 1, 256])
        outer[one]["data_offsets"] = [offset + shift for offset in outer[one]["data_offsets"]]
    else:
        del outer[one]
    return pack_file(outer, inner, section)


def poison_numbers(data, chance):
    """Scales, zeros or singular values that are not finite, or any bytes, under a checksum that matches."""
    outer, inner, section = split_file(data)
    name, entry = chance.choice([(name, entry) for name, entry in inner["records"].items() if entry["sha256"]])
    part = chance.choice(sorted(entry["sha256"]))
    start, stop = outer[f"{name}.{part}"]["data_offsets"]
    section = bytearray(section)
    width = 4 if part in ("sigma", "indices") else 2
    at = start + width * chance.randrange((stop - start) // width)
    section[at : at + width] = chance.choice(HALVES if width == 2 else SINGLES)
    entry["sha256"][part] = hashlib.sha256(section[start:stop]).hexdigest()
    return pack_file(outer, inner, bytes(section))


def append(data, chance):
    return data + bytes(chance.randrange(1, 600))


MUTATIONS = [cut, flip_anywhere, flip_header, lie_about_length, alter_outer, alter_inner, alter_record, alter_text,
             move_tensor, poison_numbers, append]  # fmt: skip


OF_DELTAS = (alter_record, poison_numbers)


def read_all(data):
    """All that a user might ask of a file."""
    delta = Delta.from_bytes(data)
    problems = delta.verify()
    for name in delta.names:
        record = delta.record(name)
        if math.prod(record.shape) <= LARGEST_PRODUCT:
            delta.apply_to(name, None)
    for name in delta.header.files:
        delta.file(name)
    delta.byte_count()
    return problems


def read_fusion_whole(data):
    """All of a fusion; its digests are compared in files only."""
    fusion = parse_fusion(data)
    return [] if fusion.experts else ["empty"]


def main(cases, seed):
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        deltas = [(sample_bytes(Path(folder), number), read_all) for number in range(4)]
        files = [write_fusion(Path(folder) / f"f{number}.st", make_fusion(number, 1 + number)) for number in range(2)]
        fusions = [(file.read_bytes(), read_fusion_whole) for file in files]
    assert all(len(data) < 131072 and read(data) == [] for data, read in deltas + fusions)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + EXTRA_MEMORY, pages + EXTRA_MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    outcomes, failures, missed = Counter(), [], 0
    for case in range(cases):
        mutate = MUTATIONS[case % len(MUTATIONS)]
        of_any = mutate not in OF_DELTAS
        original, read = chance.choice(deltas + fusions if of_any else deltas)
        data = mutate(original, chance)
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        try:
            outcome = "read, with problems" if read(data) else "read"
        except FormatError as error:
            outcome = "refused"
            if "\n" in str(error):
                failures.append(f"{mutate.__name__} case {case}: error of several lines: {error!r}"[:300])
        except BaseException as error:
            outcome = "failed"
            failures.append(f"{mutate.__name__} case {case}: {type(error).__name__}: {error}"[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome == "read" and read is read_all and changed_data(original, data):
            missed += 1
        outcomes[outcome] += 1
    print(json.dumps({"cases": cases, "outcomes": outcomes, "failures": failures[:20], "missed": missed}))


def changed_data(original, data):
    """Whether only bytes of the data section differ: those must not pass `verify`."""
    (length,) = struct.unpack("<Q", original[:8])
    head = 8 + length
    return len(original) == len(data) and original[:head] == data[:head] and original[head:] != data[head:]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
