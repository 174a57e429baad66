"""Films with known answers, that a lecturer prepares: the list and its checks, a student's answers, their score.

Nothing is written anywhere. A film is read from the lecturer's folder or archive when it is shown.
"""

import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from manet_core import XRay, XRayError
from manet_core.sources import ZIP_ERRORS, read_film
from manet_core.table import plain
from manet_core.tasks import Task, get_task

from .render import shown_name

LIST = "answers.csv"
LONGEST_NAME = 80  # characters of a student's name
_COLUMNS = ("file", "answer", "note")  # the last may be missing
_MOST_CASES, _MOST_BYTES = 500, 4 << 20  # of the list


class CasesError(ValueError):
    """A case list that cannot be used; its text has a line for each problem, a sentence each."""


@dataclass(frozen=True)
class Case:
    """A film and what the lecturer says of it.

    Attributes:
        file: its name in the list.
        answer: the class.
        note: may be "".
        read: reads the film; raises XRayError where that is no longer possible.
    """

    file: str
    answer: str
    note: str
    read: Callable[[], XRay]


@dataclass(frozen=True)
class CaseList:
    """What students are to read, in order.

    Attributes:
        task: whose classes are the answers.
        cases: one at least.
    """

    task: Task
    cases: tuple[Case, ...]

    def next_of(self, answers: dict[int, str]) -> int | None:
        """Number of the first case that {number: class} has no answer to; None if there is none."""
        return next((number for number in range(len(self.cases)) if number not in answers), None)


def asked_task(tasks: list[str]) -> Task:
    """The task whose classes a lecturer's answers are, of those that networks have: the first with one answer."""
    found = [get_task(name) for name in tasks or ["manet"]]
    return next((task for task in found if task.exclusive), found[0])


def load_cases(path: Path, task: Task) -> CaseList:
    """The case list of a folder or zip archive with films and answers.csv; each film is read once, to be sure.

    Args:
        path: the folder, or the archive, whose files may all lie in one folder within.
        task: whose classes are the answers.

    Raises:
        CasesError: with a sentence for everything that is wrong.
    """
    if path.is_dir():
        text, locate = _folder(path)
    elif path.is_file():
        text, locate = _archive(path)
    else:
        raise CasesError(f"{path} is not there; give a folder or a zip archive with films and {LIST}.")
    cases, problems, lines = [], [], {}
    for line, (name, answer, note) in tqdm(_rows(text), "case list", unit="film", disable=None, leave=False):
        try:
            source = locate(name)
            if source in lines:
                raise CasesError(f"the film is in line {lines[source]} already.")
            lines[source] = line
            known = _class(answer, task)
            read_film(source)
        except (CasesError, XRayError) as error:
            problems.append(f"{LIST}, line {line}, {_quoted(name)}: {error}")
        else:
            cases.append(Case(name, known, note, lambda source=source: read_film(source)))
    if problems:
        raise CasesError("\n".join(problems))
    return CaseList(task, tuple(cases))


def _folder(path: Path) -> tuple[str, Callable[[str], str]]:
    """The text of a folder's list, and what turns a name in it into a source of `read_film`."""
    root = path.resolve()

    def locate(name: str) -> str:
        found = root.joinpath(*_parts(name)).resolve()
        if not found.is_relative_to(root):
            raise CasesError("the path leaves the folder.")
        if not found.is_file():
            raise CasesError("there is no such file.")
        return str(found)

    try:
        return _decoded((root / LIST).read_bytes()), locate
    except OSError:
        raise CasesError(
            f"{path} has no {LIST} that can be read; write one with the columns file and answer."
        ) from None


def _archive(path: Path) -> tuple[str, Callable[[str], str]]:
    """As `_folder`, of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name for name in archive.namelist() if "__MACOSX" not in name}
            lists = [name for name in names if name.rpartition("/")[2] == LIST]
            if len(lists) != 1:
                raise CasesError(f"{path} has {'several files' if lists else 'no file'} {LIST}; put in one.")
            with archive.open(lists[0]) as file:
                text = _decoded(file.read(_MOST_BYTES + 1))
    except (*ZIP_ERRORS, OSError):
        raise CasesError(
            f"{path} is no zip archive that can be read; make an ordinary one, without a password."
        ) from None

    def locate(name: str) -> str:
        member = lists[0].removesuffix(LIST) + "/".join(_parts(name))
        if member not in names:
            raise CasesError("there is no such file in the archive.")
        return f"zip://{member}::{path.resolve()}"

    return text, locate


def _parts(name: str) -> tuple[str, ...]:
    """A path of the list, written with slashes of either kind."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise CasesError("the path leaves the folder.")
    if not path.parts:
        raise CasesError("the line names no file.")
    return path.parts


def _decoded(data: bytes) -> str:
    if len(data) > _MOST_BYTES:
        raise CasesError(f"{LIST} is larger than {_MOST_BYTES >> 20} MB; it is to hold names, answers and notes alone.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CasesError(f"{LIST} is no text in UTF-8; save it as “CSV UTF-8”.") from None


def _rows(text: str) -> list[tuple[int, tuple[str, str, str]]]:
    """(line, (file, answer, note)) of every line that is not empty."""
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=";" if ";" in head and "," not in head else ",")
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error:
        raise CasesError(f"{LIST} is no CSV file that can be read; save it as CSV once more.") from None
    lines = [(number, row) for number, row in lines if any(row)]
    names = [name.lower() for name in lines[0][1]] if lines else []
    if sorted(names) not in (sorted(_COLUMNS), sorted(_COLUMNS[:2])):
        raise CasesError(f"{LIST} needs a first line with the columns file, answer and, if you like, note.")
    if not 1 <= len(lines) - 1 <= _MOST_CASES:
        raise CasesError(f"{LIST} has {len(lines) - 1} films; give from 1 to {_MOST_CASES}, one a line.")
    problems = [
        f"{LIST}, line {number}: there are {len(row)} cells for {len(names)} columns; put a text with commas in quotes."
        for number, row in lines[1:]
        if len(row) > len(names)
    ]
    if problems:
        raise CasesError("\n".join(problems))
    cells = [(number, dict(zip(names, row))) for number, row in lines[1:]]
    return [(number, tuple(row.get(column, "") for column in _COLUMNS)) for number, row in cells]


def _class(answer: str, task: Task) -> str:
    known = {_folded(name): name for name in task.classes}
    if _folded(answer) not in known:
        classes = ", ".join(map(shown_name, task.classes))
        raise CasesError(f"the answer {_quoted(answer)} is unknown; write one of {classes}.")
    return known[_folded(answer)]


def _folded(name: str) -> str:
    return shown_name(name).casefold()


def _quoted(text: str) -> str:
    return repr(text[:100])


def progress(cases: CaseList, answers: dict[int, str]) -> str:
    """HTML: how far a student is."""
    count = len(cases.cases)
    if not answers:
        films = "one film" if count == 1 else f"{count} films"
        return f'<p class="quiz">The lecturer’s case list: {films}. You read each first, then see the answer.</p>'
    return f'<p class="quiz" role="status">Case list: <b>{len(answers)} of {count}</b> answered.</p>'


def verdict(cases: CaseList, number: int, answer: str, networks: str) -> str:
    """HTML: what a student answered of a case, the lecturer's answer and note, and what the networks say beside it."""
    case = cases.cases[number]
    right = "right" if answer == case.answer else "not right"
    note = f'<p class="lecturer">{escape(case.note)}</p>' if case.note else ""
    return f"""<section class="quiz" role="status"><p>Case {number + 1} ({escape(case.file)}). You answered
<b>{escape(shown_name(answer))}</b>, which is <b>{right}</b>: the lecturer’s answer is
<b>{escape(shown_name(case.answer))}</b>.</p>{note}<p>The networks say: {escape(networks)}. They are not scored, and
your score does not depend on them.</p></section>"""


def score(cases: CaseList, answers: dict[int, str]) -> str:
    """HTML: right of n against the lecturer's answers, with a 95 % interval; and which classes were confused."""
    from scipy.stats import binomtest  # takes nearly a second, which the start of the page need not wait for

    pairs = [(cases.cases[i].answer, answer) for i, answer in answers.items()]
    n, right = len(pairs), sum(truth == answer for truth, answer in pairs)
    if not n:
        return ""
    interval = binomtest(right, n).proportion_ci(method="wilson")
    left = len(cases.cases) - n
    rest = f" {left} of {len(cases.cases)} films have no answer yet and do not count." if left else ""
    classes = [name for name in cases.task.classes if any(name in pair for pair in pairs)]
    head = "".join(f'<th scope="col">{escape(shown_name(name))}</th>' for name in classes)
    body = ""
    for truth in classes:
        counts = [sum(pair == (truth, answer) for pair in pairs) for answer in classes]
        cells = "".join(
            f"<td{' class=top' if truth == answer else ''}>{count}</td>" for answer, count in zip(classes, counts)
        )
        body += f'<tr><th scope="row">{escape(shown_name(truth))}</th>{cells}</tr>'
    return f"""<section class="score" role="status"><h2>{right} of {n} right: {right / n:.0%}
<small>95% interval {100 * interval.low:.0f}–{100 * interval.high:.0f}</small></h2>
<p>Scored against the lecturer’s answers.{rest} The interval (Wilson) is for a long list of films like these, of which
you read {n}.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Your answers"><table>
<caption>The lecturer’s answers in rows, yours in columns.</caption>
<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"""


def as_csv(cases: CaseList, answers: dict[int, str], student: str) -> str:
    """A line for each answer, in the order of the list, under a name that the student chose."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["student", "case", "file", "answer", "lecturer", "right", "note"])
    for number, answer in sorted(answers.items()):
        case = cases.cases[number]
        cells = [plain(student), number + 1, plain(case.file), answer, case.answer]
        writer.writerow([*cells, "yes" if answer == case.answer else "no", plain(case.note)])
    return out.getvalue()
