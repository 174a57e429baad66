"""The tab for many X-rays: reading them one by one from uploads and zip archives, the table, the files to keep."""

import base64
import csv
import io
import json
import logging
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from html import escape
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from manet_core import Analysis, WeightsError, XRay, XRayError, load_xray
from manet_core.pipeline import DISCLAIMER, NO_READING
from manet_core.preprocess import resize
from manet_core.report import limits as report_limits
from manet_core.sources import ZIP_ERRORS
from manet_core.table import plain
from manet_core.tasks import get_task, list_tasks

from .networks import BATCHES, Networks
from .render import alert, data_url, fit, shown_name
from .startup import gr
from .uploads import Uploads

MOST_FILES = 1000
MOST_BYTES = 200 << 20  # of one file in an archive; a picture of 100 megapixels has that many
MOST_UNPACKED = 4 << 30  # bytes of all files in an archive
MOST_LISTED = 4 << 20  # bytes of an archive's table of contents; a file takes about a hundred
REDRAW_S = 1.5  # seconds between two looks at a growing table
_THUMBNAIL = 72
_TABLE = """
const files = new Map();  // the browser's own, by name: the server has kept none
for (const name of ['change', 'drop']) {
  document.addEventListener(name, event => {
    if (!event.target.closest('#batch-drop')) return;
    const chosen = [...(event.target.files ?? event.dataTransfer?.files ?? [])];
    if (chosen.length) files.clear();
    for (const file of chosen) files.set(file.name, file);
  }, true);
}
element.addEventListener('click', event => {
  const open = event.target.closest('button.open');
  if (!open) return;
  const given = new DataTransfer(), input = document.querySelector('#drop input[type=file]');
  given.items.add(files.get(open.dataset.file));
  document.querySelector('button[role=tab]').click();
  input.files = given.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});
element.addEventListener('click', event => {
  const head = event.target.closest('th[aria-sort]');
  if (!head) return;
  const up = head.getAttribute('aria-sort') !== 'ascending', column = head.cellIndex;
  for (const other of head.parentElement.querySelectorAll('th')) other.setAttribute('aria-sort', 'none');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  // Digits are compared as whole numbers, those after a point too: all cells have equally many of these.
  const value = row => row.cells[column].dataset.sort ?? row.cells[column].innerText;
  const body = head.closest('table').tBodies[0];
  body.append(...[...body.rows].sort((a, b) =>
    (up ? 1 : -1) * value(a).localeCompare(value(b), undefined, {numeric: true})));
});
"""
_HELP = f"""
<p class="help">Drop many X-rays, or zip archives of them: up to {MOST_FILES} pictures, up to 200 MB a file. Each is
deleted as soon as it is read; the table is kept in this page alone, until it is closed. The name of a film that
is in no archive opens it.</p>
"""


def read_all(networks: Networks, uploads: Uploads, files: list[dict]) -> Iterator[tuple[list[dict], int]]:
    """The rows so far (see `row`) and how many there will be, once before the first picture and after each.

    Raises:
        XRayError: there are more than `MOST_FILES`.
        WeightsError: weights are missing or damaged.
    """
    with pictures(uploads, files) as found:
        pipeline, rows, opening = networks.get(), [], _opening(files, [name for name, _ in found])
        yield rows, len(found)
        waiting = [networks.patiently(read) for _, read in found]
        with closing(pipeline.analyze_many(waiting, networks.at_first(), return_exceptions=True)) as analyses:
            for (name, _), one in zip(found, analyses):
                if isinstance(one, XRayError):
                    one = str(one)
                elif isinstance(one, Exception):  # the others are not to suffer for one
                    logging.error("The analysis of one file failed.", exc_info=one)
                    one = "The analysis failed, and the server’s log says why."
                rows.append(row(name, one, name in opening))
                yield rows, len(found)


def batch_tab(networks: Networks, uploads: Uploads) -> None:
    """Draw the tab into the page that is being built."""
    stopped = set()  # sessions that want no more

    def run(files: list[dict], request: gr.Request) -> Iterator[dict]:
        stopped.discard(request.session_hash)
        yield {drop: None, stop: gr.update(visible=True)}
        rows, total, drawn = [], 0, 0.0
        try:
            for rows, total in read_all(networks, uploads, files or []):
                if request.session_hash in stopped:
                    break
                if time.monotonic() - drawn > REDRAW_S * (1 + len(rows) / 100):  # a long table is drawn less often
                    yield {shown: table(rows, total, running=True)}
                    drawn = time.monotonic()
        except (XRayError, WeightsError) as error:
            yield {shown: alert("Not analysed", [str(error)]), stop: gr.update(visible=False)}
            return
        finally:
            stopped.discard(request.session_hash)
        yield {shown: table(rows, total, running=False), stop: gr.update(visible=False)}

    def end(request: gr.Request) -> None:
        stopped.add(request.session_hash)

    with gr.Row(equal_height=True):
        drop = gr.File(
            label="X-rays", show_label=False, file_count="multiple", height=76, scale=3, elem_id="batch-drop"
        )
        stop = gr.Button("Stop here", visible=False, size="sm")
    gr.HTML(_HELP, apply_default_css=False)
    shown = gr.HTML(apply_default_css=False, elem_id="batch", js_on_load=_TABLE)
    event = {"show_progress": "hidden", "api_visibility": "private"}
    drop.upload(run, drop, [drop, stop, shown], preprocess=False, **BATCHES, **event)
    stop.click(end, queue=False, **event)


@contextmanager
def pictures(uploads: Uploads, files: list[dict]) -> Iterator[list[tuple[str, Callable[[], XRay]]]]:
    """(name, function that reads it) of every file, an archive's members in its place.

    A picture is read when its function is called, which may raise XRayError. On
    leaving, whatever was not read is deleted.

    Raises:
        XRayError: there are more than `MOST_FILES`.
    """
    with ExitStack() as stack:
        found = []
        for file in files:
            stack.callback(uploads.discard, file)
        for file in files:
            name = _name(file)
            if name.lower().endswith(".zip"):
                found += _members(name, partial(stack.enter_context, uploads.opened(file)))
            else:
                found.append((name, partial(uploads.read, file)))
        if len(found) > MOST_FILES:
            raise XRayError(f"These are {len(found)} files; send at most {MOST_FILES} at once.")
        yield found


class _Archive(zipfile.ZipFile):
    """A zip archive that unpacks no more than `MOST_UNPACKED`; nothing in it is ever written to the disk."""

    def __init__(self, stream: BinaryIO):
        self.left, self._alone, guarded = MOST_UNPACKED, Lock(), _Guarded(stream)
        super().__init__(guarded)
        guarded.most = MOST_BYTES + 1

    def unpack(self, member: zipfile.ZipInfo) -> bytes:
        """The bytes of a member, and one more than `MOST_BYTES` if it has more, whatever size the archive claims."""
        with self._alone, self.open(member) as file:  # or two threads together might unpack more
            data = file.read(min(MOST_BYTES + 1, self.left))
            self.left -= len(data)
        return data


class _Guarded:
    """A stream of which no more than `most` bytes are read at once, as zipfile reads a table of contents."""

    def __init__(self, stream: BinaryIO):
        self.most, self._stream = MOST_LISTED, stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self.most:
            raise XRayError(f"The zip archive lists far more than {MOST_FILES} files; send at most {MOST_FILES}.")
        return self._stream.read(size if size >= 0 else self.most)


def _members(archive: str, enter: Callable[[], BinaryIO]) -> list[tuple[str, Callable[[], XRay]]]:
    try:
        opened = _Archive(enter())
    except XRayError as error:
        return [(archive, partial(_refuse, str(error)))]
    except (*ZIP_ERRORS, OSError, ValueError):
        return [(archive, partial(_refuse, "The zip archive is damaged; make it again."))]
    members = [m for m in opened.infolist() if not m.is_dir() and not Path(m.filename).name.startswith(".")]
    return [(Path(member.filename).name, partial(_unpack, opened, member)) for member in members]


def _refuse(sentence: str) -> XRay:
    raise XRayError(sentence)


def _unpack(archive: _Archive, member: zipfile.ZipInfo) -> XRay:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # LZMA may ask for 4 GB of memory
        raise XRayError("The file is compressed in an unusual way; make an ordinary zip archive.")
    if archive.left <= 0:
        raise XRayError(f"The archive unpacks to more than {MOST_UNPACKED >> 30} GB; send fewer files at once.")
    try:
        data = archive.unpack(member)
    except (*ZIP_ERRORS, OSError):
        raise XRayError("The file cannot be unpacked; make the archive again, without a password.") from None
    if len(data) > MOST_BYTES:
        raise XRayError(f"The file is larger than {MOST_BYTES >> 20} MB when unpacked; send the X-ray alone.")
    if data.startswith(b"PK\3\4"):
        raise XRayError("This is an archive inside an archive; send it by itself.")
    return load_xray(data)


def _opening(files: list[dict], names: list[str]) -> set[str]:
    """Which of the pictures' names the page can open: those of files that it sent by themselves, each one's own."""
    counts = Counter(names)
    return {name for name in map(_name, files) if counts[name] == 1}


def _name(file: dict) -> str:
    """What a file was called where it comes from."""
    return Path(str(file.get("orig_name") or file.get("path") or "nameless")).name


def row(name: str, found: Analysis | str, opens: bool = False) -> dict:
    """One file's entry in table, CSV and JSON: an analysis, or the sentence why there is none.

    Args:
        name: of the file.
        found: the analysis, or the sentence.
        opens: whether the page can show the film by this name.
    """
    if isinstance(found, str):
        return {"file": name, "error": found}
    small = resize(found.original, fit(found.original.shape, _THUMBNAIL))
    consensus = {task: _consensus(found, task) for task in found.tasks}
    return {"file": name} | found.to_dict() | {"consensus": consensus, "thumbnail": data_url(small), "opens": opens}


def _consensus(found: Analysis, task: str) -> dict:
    """What may be said for all networks of a task, None for nothing; what each of them says; mean probabilities."""
    names, means = found.claim_of(task), found.mean_of(task)
    return {
        "names": names,
        "votes": found.votes_of(task),
        "networks": len(found.readings_of(task)),
        "means": [means[name] for name in names or ()],
    }


def as_json(rows: list[dict]) -> str:
    """The rows as the command line's results.json has them."""
    return (
        json.dumps(
            [{k: v for k, v in r.items() if k not in ("thumbnail", "consensus", "opens")} for r in rows], indent=2
        )
        + "\n"
    )


def _tasks(rows: list[dict]) -> list[str]:
    """The tasks of the rows, in the order of the registry."""
    found = {task for r in rows for task in r.get("consensus", {})}
    return [task for task in list_tasks() if task in found]


def as_csv(rows: list[dict]) -> str:
    """A line a file: consensus of each task, each network's probability of each class, warnings, error.

    The consensus is `NO_READING` where it is withheld, for the reasons in a column of their own, and where networks
    disagree or are not sure enough; what they answered all the same is in their columns.
    """
    models = {model: reading["task"] for r in rows for model, reading in r.get("readings", {}).items()}
    tasks, columns = _tasks(rows), [(m, name) for m, task in models.items() for name in get_task(task).classes]
    head = ["file"]
    for task in tasks:
        prefix = f"{get_task(task).title}: " if len(tasks) > 1 else ""
        head += [prefix + name for name in ("consensus", "votes", "networks")]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*head, *(f"{model}: {name}" for model, name in columns), "withheld", "warnings", "error"])
    for r in rows:
        readings, cells = r.get("readings", {}), [plain(r["file"])]
        for task in tasks:
            found = r.get("consensus", {}).get(task)
            cells += ["", "", ""] if found is None else [_claim(found), *_votes(r, found)]
        cells += [f"{readings[m]['probabilities'][name]:.4f}" if m in readings else "" for m, name in columns]
        reasons = (" ".join(r.get(key, [])) for key in ("withheld", "warnings"))
        writer.writerow([*cells, *reasons, r.get("error", "")])
    return out.getvalue()


def _claim(found: dict) -> str:
    """A consensus as text."""
    return NO_READING if found["names"] is None else ", ".join(map(shown_name, found["names"])) or "no finding"


def _votes(r: dict, found: dict) -> list[str]:
    """How many networks say what, and of how many; nothing where the reading is withheld."""
    if r["withheld"]:
        return ["", ""]
    return [", ".join(f"{shown_name(name)} {n}" for name, n in found["votes"].items()) or "0", str(found["networks"])]


def table(rows: list[dict], total: int, running: bool) -> str:
    """The rows of `total` files as an HTML table whose columns sort at a click; when not `running`, with downloads."""
    failed, tasks = sum("error" in r for r in rows), _tasks(rows)
    done = f"{len(rows)} of {total} files" + (f", {failed} not read" if failed else "")
    if running:
        done = f'<span class="spinner" aria-hidden="true"></span>{done} …'
    elif rows:
        done += _download("MANet.csv", "text/csv", as_csv(rows)) + _download("MANet.json", "text/json", as_json(rows))
    names = ["file"]
    for task in tasks:
        names += [get_task(task).title if len(tasks) > 1 else "consensus", "networks", "mean probability"]
    head = "".join(
        f'<th scope="col" aria-sort="none"><button>{escape(name)}</button></th>'
        for name in [*names, "lung area", "remarks"]
    )
    limits = escape(report_limits(tasks))
    return f"""
<section class="batch"><p class="stage" role="status">{done}</p><p class="small">{DISCLAIMER} {limits}</p>
<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead>
<tbody>{"".join(_line(r, tasks) for r in rows)}</tbody></table></div></section>"""


def _download(name: str, kind: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">Save {name}</a>'


def _line(r: dict, tasks: list[str]) -> str:
    name = escape(r["file"])
    if r.get("opens"):
        name = f'<button class="open" data-file="{name}" title="Show this film">{name}</button>'
    name = f'<th scope="row">{name}</th>'
    if "error" in r:
        cells = '<td class="failed">not read</td>' + "<td></td>" * (3 * len(tasks) if tasks else 1)
        return f"<tr><td></td>{name}{cells}<td>{escape(r['error'])}</td></tr>"
    cells = ""
    for task in tasks:
        found = r["consensus"][task]
        unsaid = ' class="failed"' if found["names"] is None else ""
        votes = " of ".join(filter(None, _votes(r, found)))
        cells += f"<td{unsaid}>{escape(_claim(found))}</td>"
        cells += f'<td data-sort="{max(found["votes"].values(), default=0)}">{escape(votes)}</td>'
        means = " / ".join(f"{mean:.0%}" for mean in found["means"])
        cells += f'<td data-sort="{max(found["means"], default=0):.6f}">{means}</td>'
    return (
        f'<tr><td><img src="{r["thumbnail"]}" alt=""></td>{name}{cells}'
        f'<td data-sort="{r["lung_area"]:.6f}">{r["lung_area"]:.0%}</td><td>{escape(" ".join(r["warnings"]))}</td></tr>'
    )
