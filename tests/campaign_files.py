"""Damaged files of every kind: each must end in an X-ray or in the sentence of an `XRayError`.

Files are read in a child process, so that one that kills the reader, holds it
for more than `LONGEST_S` or takes more than `MOST_BYTES` is found and named.
"""

import argparse
import multiprocessing
import random
import re
import struct
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import test_xray as xrays

LONGEST_S = 10
MOST_BYTES = 1500 << 20
ADDRESS_SPACE = 6 << 30  # of the child, so that a faulty reader does not take the machine with it
_EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_HEADER = 1000  # bytes; where most of a file's structure is


def corpus() -> dict[str, bytes]:
    """Whole files by name, "kind: which": all that the tests of reading have, and pydicom's own test files."""
    import pydicom.data

    whole = {f"picture: {name}": data for name, data in (xrays.PICTURES | xrays.DEEP_PICTURES).items()}
    whole |= {f"picture: {name}": data for name, data in xrays.KINDS.items() if "DICOM" not in name}
    whole |= {f"DICOM: {name}": data for name, data in xrays.KINDS.items() if "DICOM" in name}
    whole |= {f"DICOM: {name}": make() for name, (make, _) in xrays.LAID_OUT.items()}
    whole |= {f"DICOM: {name}": xrays.dicom(bits=12, **header) for name, (header, _) in xrays.HEADERS.items()}
    whole["DICOM: 12-bit JPEG"] = xrays.extended_jpeg(12, xrays.LEVELS, xrays.jpeg12(xrays.LEVELS))
    folder = Path(pydicom.data.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc", ".json", ".txt", ".md"):
            whole[f"pydicom's: {path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return whole


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """`data` with one to four faults, some of them pieces of `other`."""
    out = bytearray(data)
    gentle = chance.random() < 0.5  # a file that is nearly right gets further into a reader
    for _ in range(1 if gentle else chance.randint(1, 4)):
        end = min(len(out), _HEADER) if chance.random() < 0.7 else len(out)
        at = chance.randrange(max(1, end))
        length = chance.choice((1, 2, 4, 8, 64, 1024, len(out) // 4 + 1))
        fault = chance.randrange(4 if gentle else 9)
        if fault == 0:
            for position in chance.choices(range(max(1, end)), k=min(end, chance.randint(1, 16))):
                out[position] = chance.randrange(256)
        elif fault == 1:
            out[at : at + 1] = bytes([(out[at] ^ 1 << chance.randrange(8)) if out else 0])
        elif fault == 2:
            form = chance.choice((">I", "<I", ">H", "<H"))
            edge = chance.choice(_EDGES) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
            out[at : at + struct.calcsize(form)] = struct.pack(form, edge)
        elif fault == 3:  # a number of a DICOM's pixel module
            places = [found.start() for found in re.finditer(rb"\x28\0.[\0\x10\x11\x12\x30]", out, re.DOTALL)]
            place = chance.choice(places) + 8 if places else at
            out[place : place + 2] = struct.pack("<H", chance.choice(_EDGES) & 0xFFFF)
        elif fault == 8:
            del out[at:]
        elif fault == 4:
            del out[at : at + length]
        elif fault == 5:
            out[at:at] = out[at : at + length] * chance.choice((1, 2, 50))
        elif fault == 6:
            start = chance.randrange(max(1, len(other)))
            out[at : at + length] = other[start : start + length]
        else:
            out[at:at] = chance.randbytes(min(length, 4096))
    return _with_checksums(out) if chance.random() < 0.7 else bytes(out)


def _with_checksums(png: bytearray) -> bytes:
    """A PNG whose chunks have the checksums of what is in them, so that a reader goes on; other files as they are."""
    at = 8
    while png[:4] == b"\x89PNG" and at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4])
        if at + 12 + length > len(png):
            break
        png[at + 8 + length : at + 12 + length] = zlib.crc32(png[at + 4 : at + 8 + length]).to_bytes(4)
        at += 12 + length
    return bytes(png)


def damaged(whole: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The file of this `number` in the campaign of this `seed`: the name of what it was, and its bytes."""
    chance = random.Random(f"{seed} {number}")
    kinds = sorted({name.split(": ")[0] for name in whole})
    kind = kinds[number % len(kinds)]
    names = sorted(name for name in whole if name.startswith(f"{kind}: "))
    name = chance.choice(names)
    return name, mutated(whole[name], whole[chance.choice(sorted(whole))], chance)


def _most_memory() -> int:
    """The most bytes of memory that this process or one of its children had.

    Linux counts for a new process what the one that started it had (`ru_maxrss`), so there its status says it.
    """
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        own = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1])
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own, children) * unit


def _reader(pipe) -> None:
    """The child: for each file its outcome ("read", "refused" or what is wrong), and the most memory so far."""
    import resource

    from manet_core import XRayError, load_xray

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    while True:
        data = pipe.recv()
        try:
            x = load_xray(data)
        except XRayError as error:
            outcome = "refused" if xrays.one_sentence(str(error)) else f"no sentence: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            fine = 0 <= x.pixels.min() <= x.pixels.max() <= 1 and x.pixels.ndim == 2  # false if there is a NaN
            outcome = "read" if fine and all(map(xrays.one_sentence, x.remarks)) else "values or remarks are wrong"
        pipe.send((outcome, _most_memory()))


class Reader:
    """A child process that reads files, replaced by a new one when it dies or has to be ended.

    Args:
        target: what the child does.
        method: how it is started.
    """

    def __init__(self, target=_reader, method: str = "spawn"):
        self._child, self._target, self._context = None, target, multiprocessing.get_context(method)

    def read(self, data: bytes) -> tuple[str, int]:
        """("read", "refused", or what is wrong; most bytes of memory of the child so far)."""
        if self._child is None:
            self._pipe, end = multiprocessing.Pipe()
            self._child = self._context.Process(target=self._target, args=(end,), daemon=True)
            self._child.start()
            end.close()
            self._pipe.send(xrays.PICTURES["PNG 8"])  # which waits for the child's imports
            self._pipe.recv()
        self._pipe.send(data)
        try:
            outcome, memory = self._pipe.recv() if self._pipe.poll(LONGEST_S) else (f"over {LONGEST_S} s", 0)
        except EOFError:
            self._child.join()
            outcome, memory = f"the process died with {self._child.exitcode}", 0
        if memory > MOST_BYTES:
            outcome = f"{memory >> 20} MB of memory"
        if outcome not in ("read", "refused"):
            self.close()
        return outcome, memory

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._child = None


@dataclass
class Result:
    """What came of a campaign: how many files of each kind had which outcome, and those that had a wrong one."""

    outcomes: Counter = field(default_factory=Counter)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)  # (number, name, outcome)
    slowest: float = 0
    memory: int = 0
    seconds: float = 0

    def table(self) -> str:
        """Markdown."""
        lines = ["| damaged files | read | refused in a sentence | anything else |", "|---|---|---|---|"]
        kinds = sorted({kind for kind, _ in self.outcomes})
        for kind in kinds:
            cells = [self.outcomes[kind, outcome] for outcome in ("read", "refused", "wrong")]
            lines.append(f"| {kind}, {sum(cells)} | {' | '.join(map(str, cells))} |")
        lines.append(
            f"\n{sum(self.outcomes.values())} files in {self.seconds:.0f} s; slowest {self.slowest:.1f} s, "
            f"most memory {self.memory >> 20} MB"
        )
        return "\n".join(lines)


def campaign(count: int, seed: int = 0, first: int = 0, keep: Path | None = None) -> Result:
    """Read `count` damaged files from number `first` on; those with a wrong outcome are written to `keep`."""
    whole, result, reader, start = corpus(), Result(), Reader(), time.monotonic()
    try:
        for number in range(first, first + count):
            name, data = damaged(whole, seed, number)
            begun = time.monotonic()
            outcome, memory = reader.read(data)
            result.slowest = max(result.slowest, time.monotonic() - begun)
            result.memory = max(result.memory, memory)
            fine = outcome in ("read", "refused")
            result.outcomes[name.split(": ")[0], outcome if fine else "wrong"] += 1
            if not fine:
                result.wrong.append((number, name, outcome))
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}").write_bytes(data)
    finally:
        reader.close()
        result.seconds = time.monotonic() - start
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m tests.campaign files`."""
    parser.add_argument("--count", type=int, default=10000, help="damaged files to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to repeat one of them")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write files with a wrong outcome there")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    result = campaign(args.count, args.seed, args.first, args.keep)
    print(result.table())
    for number, name, outcome in result.wrong:
        print(f"--seed {args.seed} --first {number} --count 1: {name}: {outcome}", file=sys.stderr)
    return 1 if result.wrong else 0
