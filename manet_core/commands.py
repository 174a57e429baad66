"""What the verbs of the command line do."""

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from .dicom_out import dicom_out
from .explain import DEFAULT, Explainer, get_explainer
from .files.xray import XRayError, load_xray
from .networks.registry import create_classifier, list_models
from .pipeline import NO_READING, Analysis, Pipeline, sentence
from .report import save_report
from .results import Results, replace_file
from .sources import SourceError, film_names, pictures_in
from .tasks import Task, get_task
from .weights import SEGMENT, WeightsError, read_manifest, task_of

_LONGEST = 200  # bytes of a panel's name; most file systems take 255, some encrypted ones fewer


class _UsageError(Exception):
    """What was asked for cannot be done; its text says why."""


def run(args: argparse.Namespace) -> int:
    """Do what `args` ask for; returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # on Windows, the code page of a file or pipe may lack a letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        verbs = {"analyze": analyze, "batch": batch, "listen": listen, "models": models}
        return verbs[args.verb](args)
    except (WeightsError, SourceError, _UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def analyze(args: argparse.Namespace) -> int:
    """Write results.json, and a panel PNG per image; 0: all read, 1: some failed, 130: interrupted."""
    images, networks = _pictures(args.images, args.recursive, args.out), _asked(args.weights, args.models)
    try:
        explainer = get_explainer(args.explainer or DEFAULT)
    except ValueError as error:
        raise _UsageError(error) from None
    if args.no_panels and not args.explainer:
        explainer = None
    missing = _missing(images)
    classes = [name for task in networks.values() for name in task.classes]
    try:
        with _stopped_gently():
            pipe = _pipeline(args, list(networks), explainer) if len(missing) < len(set(images)) else None
            args.out.mkdir(parents=True, exist_ok=True)
            results = Results(args.out, classes if args.csv else None)
            try:
                table = _analyze_all(args, images, missing, pipe, explainer, results)
            finally:
                results.save()
    except KeyboardInterrupt:
        print("Interrupted; what was finished is in the output folder.", file=sys.stderr)
        return 130
    except OSError as error:
        raise _UsageError(
            f"{args.out} cannot be written to ({error.strerror}); make room or choose another --out."
        ) from None
    if results.failed and len(images) > 1:
        print(f"{results.failed} of {len(images)} files failed; results.json says why.", file=sys.stderr)
    for line in [results.json()] if args.json else table:
        print(line)
    return int(results.failed > 0)


def batch(args: argparse.Namespace) -> int:
    """Read an archive into Parquet files; 0: all read, 1: some failed, 130: interrupted."""
    from . import archive  # needs pyarrow, as nothing else does
    from .cluster import ClusterError, read_by_ray

    networks = _asked(args.weights, args.models)
    names = film_names(args.sources)
    weights = os.path.abspath(args.weights)
    job = archive.Job(os.path.abspath(args.out), weights, tuple(networks), args.device, args.masks, args.heatmaps)
    entries = read_manifest(weights)
    read, failed, unfetched, left = 0, 0, 0, names
    status, started, cores = 0, time.monotonic(), torch.get_num_threads()
    try:
        with _stopped_gently():
            known = archive.begin(job, entries)
            left = [name for name in names if archive.text(name) not in known]
            if args.engine == "ray" and left:
                cores = args.workers
                found = read_by_ray(job, left, args.part, args.workers, args.gpus)
            else:
                found = archive.read_here(job, left, args.part)
            with tqdm(total=len(names), initial=len(names) - len(left), unit="X-ray", disable=None) as bar:
                with closing(found):
                    for some, bad, missed in found:
                        read, failed, unfetched = read + some, failed + bad, unfetched + missed
                        bar.update(some + bad)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        status = 130
    except (archive.ArchiveError, ClusterError) as error:
        raise _UsageError(error) from None
    except OSError as error:
        raise _UsageError(
            f"{args.out} cannot be written to ({error.strerror}); make room or choose another --out."
        ) from None
    if unfetched:
        print(f"{unfetched} could not be fetched; the same command asks for them again.", file=sys.stderr)
    done = archive.summary(read, failed, len(names) - len(left), time.monotonic() - started, cores)
    replace_file(args.out / "summary.json", (json.dumps(done, indent=2) + "\n").encode())
    print(", ".join(f"{key} {value}" for key, value in done.items()))
    return status or int(failed > 0)


def models(args: argparse.Namespace) -> int:
    """List every network, its parameters, the task of its weights, and whether there are any."""
    try:
        entries = read_manifest(args.weights)
    except WeightsError as error:
        print(error, file=sys.stderr)
        entries = {}
    shipped = {name: entry for name, entry in entries.items() if entry.get("task") != SEGMENT}
    for name in dict.fromkeys([*list_models(), *shipped]):
        network, task, classes = name, "", None
        if name in shipped:
            network, task = shipped[name]["network"]["name"], shipped[name]["task"]
            classes = len(task_of(name, shipped[name]).classes)
        parameters = _parameters(network, classes)
        weights = "weights" if name in shipped else "no weights"
        print(f"{name:26}{parameters / 1e6:8.2f} M parameters   {task:8}  {weights}")
    return 0


def listen(args: argparse.Namespace) -> int:
    """Receive films by DICOM until interrupted; then finish those that were accepted."""
    try:
        from .listen import Peer, Receiver
    except ImportError:
        raise _UsageError("listen needs one package more: pip install pynetdicom") from None
    if args.out is None and args.return_to is None:
        raise _UsageError("Say where results go: --out DIR, --return-to AE@HOST:PORT, or both.")
    if not args.allow and args.host not in ("127.0.0.1", "::1", "localhost"):
        raise _UsageError("Name those who may call with --allow before you listen to a network.")
    networks = _asked(args.weights, args.models)
    classes = [name for task in networks.values() for name in task.classes] if args.csv else None
    peer = args.return_to and Peer(*args.return_to)
    with _stopped_gently():
        pipe = _pipeline(args, list(networks), get_explainer(DEFAULT))
        try:
            receiver = Receiver(pipe, args.title, args.allow, classes, args.out, peer, args.waiting)
            host, port = receiver.start(args.host, args.port)
        except OSError as error:
            raise _UsageError(f"It cannot begin ({error.strerror}); choose another --port or --out.") from None
        print(f"MANet listens as {args.title} at {host}:{port} (Ctrl-C ends it).", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("What was accepted is being finished; once more, and only the film at hand is.", file=sys.stderr)
        try:
            receiver.stop()
        except KeyboardInterrupt:
            receiver.stop()
    return 0


def _pictures(given: list[Path], recursive: bool, out: Path) -> list[Path]:
    """The files that are given, and in a folder's place the pictures in it."""
    found = []
    for path in given:
        if not os.path.isdir(path):
            found.append(path)
            continue
        if os.path.realpath(path) == os.path.realpath(out):
            raise _UsageError(f"{path} is the folder to read; choose another --out.")
        try:
            inside = list(pictures_in(path, recursive, out, _fail))
        except OSError as error:
            raise _UsageError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
        if not inside:
            more = "" if recursive else "; --recursive reads the folders within it too"
            raise _UsageError(f"There is no picture in {path}{more}.")
        found += inside
    return found


def _fail(error: OSError) -> None:
    raise error


@cache
def _parameters(network: str, classes: int | None) -> int:
    """How many a classifier has, for so many classes; None: as many as its family's paper has."""
    with torch.device("meta"):  # counts without allocating
        net = create_classifier(network, **({} if classes is None else {"num_classes": classes}))
    return sum(p.numel() for p in net.parameters())


def _asked(weights: str, models: str | None) -> dict[str, Task]:
    """The networks to ask, and their tasks."""
    entries = read_manifest(weights)
    known = [name for name, entry in entries.items() if entry.get("task") != SEGMENT]
    names = known if models is None else [name for name in models.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise WeightsError(f"There are no weights of {unknown[0]!r}; choose from: {', '.join(known) or 'none'}.")
    return {name: task_of(name, entries[name]) for name in names}


@contextmanager
def _stopped_gently() -> Iterator[None]:
    """SIGTERM is taken for Ctrl-C, so that what was finished is kept."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _missing(images: list[Path]) -> set[Path]:
    """The images that are not there, each told at once, before the minutes that the others may take."""
    missing = dict.fromkeys(image for image in images if not os.path.exists(image))
    for image in missing:
        print(f"{_shown(image)}: {sentence(_try(lambda image=image: load_xray(image)))}", file=sys.stderr)
    return set(missing)


def _pipeline(args: argparse.Namespace, networks: list[str], explainer: Explainer | None) -> Pipeline:
    """The networks, loaded; all can be explained as was asked."""
    pipe = Pipeline.load(args.weights, networks, args.device)
    if explainer is not None:
        try:
            pipe.check_suits(explainer)
        except ValueError as error:
            raise _UsageError(error) from None
    return pipe


def _analyze_all(
    args: argparse.Namespace,
    images: list[Path],
    missing: set[Path],
    pipe: Pipeline | None,
    explainer: Explainer | None,
    results: Results,
) -> list[str]:
    """Analyse the images into `results`; returns the table that tells of them."""
    table = []
    bar = tqdm(total=len(images), unit="X-ray", disable=None if len(images) > 1 else True)
    with bar, closing(_analyses(pipe, images, explainer)) as analyses:
        for (image, found), panel in zip(analyses, _panel_names(images)):
            fault = None
            if isinstance(found, str):
                fault = found
                results.refuse(str(image), found)
            else:
                if not args.no_panels:
                    fault = _save_panel(found, args.out / panel, image.name, pipe.hashes)
                if args.dicom:
                    fault = _save_dicom(found, args.out / panel, image, pipe) or fault
                results.add(str(image), found, fault)
                table += [_shown(image), *_lines(found)]
            if fault and image not in missing:
                tqdm.write(f"{_shown(image)}: {fault}", file=sys.stderr)
            bar.update()
    return table


def _save_panel(analysis: Analysis, path: Path, title: str, hashes: dict[str, str]) -> str | None:
    """Write the panel; returns a sentence if it cannot be drawn, which is no reason to lose the analysis."""
    page = io.BytesIO()
    try:
        save_report(analysis, page, title, hashes=hashes, format="png")
    except Exception as error:
        return f"The panel could not be drawn ({type(error).__name__}); the readings are in results.json."
    replace_file(path, page.getvalue())


def _save_dicom(analysis: Analysis, panel: Path, image: Path, pipe: Pipeline) -> str | None:
    """Write the DICOM objects beside the panel; returns a sentence if the film allows none of them."""
    try:
        made = dicom_out(analysis, pipe, image)
    except XRayError as error:
        return str(error)
    for kind, data in made.files.items():
        replace_file(panel.with_name(f"{panel.stem}-{kind}.dcm"), data)
    for reason in made.missing:
        tqdm.write(f"{_shown(image)}: {reason}", file=sys.stderr)


def _analyses(
    pipe: Pipeline | None, images: list[Path], explainer: Explainer | None
) -> Iterator[tuple[Path, Analysis | str]]:
    """The images with their analyses, or the sentences why there are none, in order; without explainer no heatmaps."""
    if pipe is None:  # there is none of them
        found = (_try(lambda image=image: load_xray(image)) for image in images)
    elif explainer is not None and explainer.slow:
        found = (_try(lambda image=image: _analyze_slowly(pipe, image, explainer)) for image in images)
    else:
        by = DEFAULT if explainer is None else explainer.name
        found = pipe.analyze_many(images, heatmaps=explainer is not None, explainer=by, return_exceptions=True)
    with closing(found):
        for image, one in zip(images, found):
            yield image, sentence(one) if isinstance(one, Exception) else one


def _try(function: Callable[[], Analysis]) -> Analysis | Exception:
    try:
        return function()
    except Exception as error:
        return error


def _analyze_slowly(pipe: Pipeline, image: Path, explainer: Explainer) -> Analysis:
    layout = "{l_bar}{bar}| {n:.1f} of {total} networks [{elapsed}<{remaining}]"
    with tqdm(total=len(pipe.models), desc=explainer.title, bar_format=layout, leave=False) as bar:
        return pipe.analyze(image, explainer=explainer.name, progress=lambda done, _: bar.update(done - bar.n))


def _panel_names(images: list[Path]) -> list[str]:
    """One file name a picture, all different and not too long; those of the same name are numbered."""
    names, counts = [], {}
    for image in images:
        stem = image.name or "image"
        if len(os.fsencode(stem)) > _LONGEST:
            stem = os.fsencode(stem)[:_LONGEST].decode(errors="ignore")
        name = f"{stem}.png"
        while name.casefold() in counts:  # some file systems take "A.png" for "a.png"
            counts[stem.casefold()] = number = counts.get(stem.casefold(), 1) + 1
            name = f"{stem}-{number}.png"
        counts[name.casefold()] = counts.get(name.casefold(), 1)
        names.append(name)
    return names


def _shown(path: Path) -> str:
    """A path as a terminal may print it: a file's name may hold control characters, or bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def _lines(analysis: Analysis) -> list[str]:
    """An analysis as lines of a table: a network and what it holds for true each, and the warnings."""
    lines = []
    for model, reading in analysis.readings.items():
        if not analysis.reliable:
            said = NO_READING
        elif get_task(reading.task).exclusive:
            said = f"{reading.predicted:22}{reading.probabilities[reading.predicted]:6.1%}"
        else:
            said = ", ".join(f"{name} {reading.probabilities[name]:.1%}" for name in reading.present) or "no finding"
        lines.append(f"  {model:26}{said}")
    for task in analysis.tasks if analysis.reliable else ():
        if analysis.divided_of(task):
            lines.append(f"  {NO_READING}: the networks disagree ({get_task(task).title})")
        elif analysis.unsure_of(task):
            lines.append(f"  {NO_READING}: not sure enough ({get_task(task).title})")
    return lines + [f"  warning: {warning}" for warning in analysis.warnings]
