"""How fast is the page, and does it answer correctly under load? Needs Chromium, as the tests do.

    python -m ui.benchmark             # ten to fifteen minutes, most of them for an archive of 500 X-rays
    python -m ui.benchmark --users 0 --files 0    # one reader alone, and how smoothly the viewer moves: two minutes
    python -m ui.benchmark --record    # also into docs/speed.md
    python -m ui.benchmark load        # 16 people for ten minutes, beside an archive of 500 X-rays

Serves the page on a free port and drives it as people would: a browser that
drops phantoms of 2000×2000 pixels and asks for other heatmaps, of three
networks and of all; programs that send their own X-rays all at once; and one
that sends an archive.
"""

import argparse
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from threading import Barrier

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tqdm import tqdm

from manet_core import CLASSES, list_models
from manet_core.phantom import phantom
from manet_core.weights import read_manifest
from train.evaluate import write_between
from train.measures import speed

ROOT = Path(__file__).parent.parent
ANOTHER_CLASS = """
label => new Promise(done => {
  const start = performance.now(), explained = document.querySelector('.under .explained');
  const look = () => explained.textContent.startsWith('Heatmap of ' + label)
    ? requestAnimationFrame(() => done(performance.now() - start)) : requestAnimationFrame(look);
  document.querySelector(`.readings [data-name="${label}"]`).click();
  requestAnimationFrame(look);
})
"""  # milliseconds from the click until the heatmap of that class is on the screen
FRAMES = """
([what, seconds]) => new Promise(done => {
  const viewer = document.querySelector('.viewer'), stage = viewer.querySelector('.stage');
  const {x, y} = stage.getBoundingClientRect(), start = performance.now(), before = viewer.drawn;
  const send = (name, more) => stage.dispatchEvent(new PointerEvent(name, {pointerId: 1, bubbles: true, ...more}));
  if (what === 'window') send('pointerdown', {button: 2, clientX: x + 300, clientY: y + 200});
  let number = 0;
  const move = () => {
    number++;
    if (what === 'window') send('pointermove', {clientX: x + 300 + number % 100, clientY: y + 200});
    else stage.dispatchEvent(new WheelEvent('wheel', {deltaY: number % 40 < 20 ? -60 : 60, clientX: x + 350,
      clientY: y + 250, bubbles: true, cancelable: true}));
    const passed = performance.now() - start;
    if (passed < 1000 * seconds) return requestAnimationFrame(move);
    if (what === 'window') send('pointerup', {});
    done(1000 * (viewer.drawn - before) / passed);
  };
  requestAnimationFrame(move);
})
"""  # frames a second while the wheel zooms in and out, or the right button sets the window


png = lru_cache(100)(speed.film)  # a phantom of (side, side) pixels, by its seed, as the bytes of a file


@contextmanager
def served(weights: Path, models: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(url, process number) of the page with these networks, as soon as it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--weights", str(weights.resolve())]
    command += ["--models", *models]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def processor() -> str:
    """What Linux calls the processor, elsewhere its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process, in MiB: now, or with "VmHWM" the most so far."""
    return speed.resident(field, pid) / 2**20


def opened(browser: Browser, url: str) -> Page:
    """The page in a window of its own, painted."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector("#drop")
    return page


def start(browser: Browser, weights: Path, models: Sequence[str]) -> float:
    """Seconds from the command to the painted page."""
    begin = time.perf_counter()
    with served(weights, models) as (url, _):
        opened(browser, url).close()
        return time.perf_counter() - begin


def one_reader(page: Page, folder: Path, films: list[bytes]) -> dict[str, float]:
    """Seconds from dropping a file to its last heatmap, and from another class to other heatmaps."""
    drop = [dropped(page, folder, film)[1] for film in tqdm(films, "dropping", leave=False)]
    page.locator("#anyway, .readings").locator("visible=true").first.wait_for()
    if page.is_visible("#anyway"):  # networks may disagree about a drawing, and then their answers are asked for
        page.click("#anyway")
    page.wait_for_selector(".readings")
    _, *redraw = [page.evaluate(ANOTHER_CLASS, label) / 1000 for label in CLASSES * 4]  # the first may be shown already
    page.close()
    first, *later = drop  # the networks wake with the first
    return {
        "first drop, at once after the start, s": first,
        "drop to last heatmap, median, s": float(np.median(later)),
        "drop to last heatmap, 95th percentile, s": float(np.percentile(later, 95)),
        "another class, median, s": float(np.median(redraw)),
    }


def dropped(page: Page, folder: Path, film: bytes) -> tuple[float, float]:
    """Seconds from dropping a file until it is on the screen, and until its heatmaps are."""
    (folder / "film.png").write_bytes(film)
    before, seconds = [page.get_attribute(".viewer", f"data-{what}") for what in ("film", "answered")], []
    start = time.perf_counter()
    page.set_input_files("#drop input[type=file]", folder / "film.png")
    for what, old in zip(("film", "answered"), before):
        page.wait_for_function(f"old => (document.querySelector('.viewer').dataset.{what} ?? null) !== old", arg=old)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def large_film(page: Page, folder: Path, side: int, drops: int) -> dict[str, float]:
    """A film of `side` × `side` pixels of 16 bits: how soon it is seen, and how smoothly it moves under its heatmap."""
    noise = np.random.default_rng(0).normal(0, 0.004, (side, side))  # a drawing alone is no match for a compressor
    pixels = (np.clip(phantom(side, seed=2).pixels + noise, 0, 1) * 65535).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    _, *seconds = [
        dropped(page, folder, buffer.getvalue()) for _ in range(drops + 1)
    ]  # the networks wake with the first
    film, answer = np.median(seconds, 0)
    frames = {what: page.evaluate(FRAMES, [what, 2]) for what in ("zoom", "window")}
    by = page.get_attribute(".viewer", "data-renderer")
    page.close()
    return {
        f"film of {side}×{side}: drop to film, median, s": float(film),
        f"film of {side}×{side}: drop to last heatmap, median, s": float(answer),
        f"film of {side}×{side}: frames a second of zoom ({by})": frames["zoom"],
        f"film of {side}×{side}: frames a second of window ({by})": frames["window"],
    }


def many_users(url: str, pid: int, folder: Path, users: int, seconds: float) -> dict[str, float]:
    """`users` programs that ask without a pause, each of X-rays of its own size, by which an answer is known."""
    before, end = memory(pid), time.monotonic() + seconds

    def use(number: int) -> tuple[int, int]:
        size = 500 + number
        path = folder / f"user{number}.png"
        path.write_bytes(png(size, number))
        client, answers, wrong, first = Client(url, verbose=False), 0, 0, None
        while answers == 0 or time.monotonic() < end:
            found = client.predict(handle_file(path), api_name="/analyze")
            first = first or found
            answers, wrong = answers + 1, wrong + (found != first or found["height"] != size)
        return answers, wrong

    with ThreadPoolExecutor(users) as pool:
        counts = list(pool.map(use, range(users)))
    return {
        "users at once": users,
        "answers": sum(answers for answers, _ in counts),
        "wrong or mixed-up answers": sum(wrong for _, wrong in counts),
        "memory before, MiB": before,
        "memory after, MiB": memory(pid),
    }


def archive(url: str, pid: int, folder: Path, files: int) -> dict[str, float]:
    """An archive of `files` X-rays, read while another user asks for one of theirs now and then."""
    path, film = folder / "films.zip", folder / "other.png"
    film.write_bytes(png(512, 1))
    with zipfile.ZipFile(path, "w") as films:
        for number in range(files):
            films.writestr(f"{number}.png", png(512, number % 20))
    batch = Client(url, verbose=False).submit([handle_file(path)], api_name="/batch")
    other, waits, start = Client(url, verbose=False), [], time.perf_counter()
    while not batch.done():
        asked = time.perf_counter()
        other.predict(handle_file(film), api_name="/analyze")
        waits.append(time.perf_counter() - asked)
        time.sleep(2)
    rows = batch.result()
    return {
        "X-rays in the archive": files,
        "of them read": sum("readings" in row for row in rows),
        "seconds for all": time.perf_counter() - start,
        "another user's wait meanwhile, median, s": float(np.median(waits)),
        "most memory, MiB": memory(pid, "VmHWM"),
    }


def load(
    url: str, pid: int, folder: Path, users: int, seconds: float, files: int, pause: float
) -> dict[str, float | int | str]:
    """Readers who send a film, look at the answer for `pause` seconds and send the next, beside an archive.

    Each film has a height of its own and is sent again and again, so that an answer that belongs to another is known.
    Memory is taken after everybody's first answer; after a fifth of the time, when each network has been run alone and
    for the archive, and each thread has its buffers; and at the end.
    """
    end, waits, faults = time.monotonic() + seconds, [], Counter()
    counts, warm = Counter(), Barrier(users + bool(files) + 1)

    def ask(call: Callable[[], object]) -> object | None:
        asked = time.perf_counter()
        try:
            answer = call()
        except Exception as error:  # whatever it is, it is counted
            faults[f"{type(error).__name__}: {str(error)[:80]}"] += 1
            return None
        waits.append(time.perf_counter() - asked)
        return answer

    def read(number: int) -> None:
        client, first = Client(url, verbose=False, httpx_kwargs={"timeout": 60}), {}
        films = {}
        for kind in range(2):
            films[size := 500 + 2 * number + kind] = folder / f"user{number}-{kind}.png"
            films[size].write_bytes(png(size, number))
        chance, turn = Random(number), 0
        while turn < 2 or time.monotonic() < end:
            size = [*films][turn % 2]
            found = ask(partial(client.predict, handle_file(films[size]), api_name="/analyze"))
            if found is not None:
                counts["answers"] += 1
                counts["mixed up"] += found != first.setdefault(size, found) or found["height"] != size
            warm.wait() if turn == 0 else None
            turn += 1
            time.sleep(max(0, min(pause * chance.uniform(0.5, 1.5), end - time.monotonic())))

    def send_archive() -> None:
        path = folder / "load.zip"
        with zipfile.ZipFile(path, "w") as films:
            for number in range(files):
                films.writestr(f"{number}.png", png(400 + number % 20, number % 20))
        job, ready = (
            Client(url, verbose=False, httpx_kwargs={"timeout": 60}).submit([handle_file(path)], api_name="/batch"),
            False,
        )
        try:
            for rows in job:
                counts["archive"] = len(rows)
                if rows and not ready:
                    ready = warm.wait() >= 0
                if time.monotonic() > end:
                    job.cancel()
                    break
            for number, row in enumerate(rows):
                counts["mixed up"] += (row["file"], row.get("height")) != (f"{number}.png", 400 + number % 20)
        except Exception as error:
            faults[f"archive, {type(error).__name__}: {str(error)[:80]}"] += 1
        finally:
            warm.wait() if not ready else None

    with ThreadPoolExecutor(users + 1) as pool:
        jobs = [pool.submit(read, number) for number in range(users)]
        jobs += [pool.submit(send_archive)] if files else []
        warm.wait()
        before = memory(pid)
        time.sleep(max(0, (end - time.monotonic()) / 5))
        settled = memory(pid)
        for job in jobs:
            job.result()
    after = memory(pid)
    return {
        "readers, and seconds for which each looks at an answer": f"{users}, {pause:g}",
        "seconds in all": float(seconds),
        "answers": counts["answers"],
        "X-rays of the archive read meanwhile": f"{counts['archive']} of {files}",
        "errors": faults.total(),
        **{f"error: {what}": count for what, count in faults.items()},
        "wrong or mixed-up answers": counts["mixed up"],
        "wait, median, s": float(np.median(waits)),
        "wait, 95th percentile, s": float(np.percentile(waits, 95)),
        "longest wait, s": max(waits),
        "memory after everybody's first answer, MiB": before,
        "memory after a fifth of the time, MiB": settled,
        "memory at the end, MiB": after,
        "growth since a fifth of the time, %": 100 * (after / settled - 1),
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [f"On {results['machine']}:", "", "| what | figure |", "|---|---|"]
    for name, value in results.items():
        if name != "machine":
            lines.append(f"| {name} | {value:.2f} |" if isinstance(value, float) else f"| {name} | {value} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write results/page.json."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["page", "load"], default="page", help="page (default), or load alone")
    p.add_argument("--minutes", type=float, default=10, help="of load")
    p.add_argument("--readers", type=int, default=16, help="of load")
    p.add_argument("--pause", type=float, default=20, help="of load: seconds for which a reader looks at an answer")
    p.add_argument("--weights", default=ROOT / "weights", type=Path)
    p.add_argument("--starts", type=int, default=5)
    p.add_argument("--drops", type=int, default=20)
    p.add_argument("--side", type=int, default=3000, help="of the large film, pixels")
    p.add_argument("--users", type=int, default=8, help="0: leave them and their figures as they are")
    p.add_argument("--seconds", type=float, default=120)
    p.add_argument("--files", type=int, default=500, help="X-rays in the archive; 0 as above")
    p.add_argument("--out", default=ROOT / "results", type=Path)
    p.add_argument("--record", action="store_true", help="write the figures into docs/speed.md")
    args = p.parse_args()
    shipped = tuple(name for name in list_models() if name in read_manifest(args.weights))
    path, machine = args.out / "page.json", f"{os.cpu_count()} CPU cores ({processor()})"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if results.get("machine") != machine:
        results = {"machine": machine}  # figures of two machines do not belong into one table
    if args.what == "load":
        results = {what: value for what, value in results.items() if not what.startswith("load: ")}
    results |= _load(args, shipped) if args.what == "load" else _page(args, shipped)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    if args.record:
        write_between(ROOT / "docs" / "speed.md", "page", table(results))


def _load(args: argparse.Namespace, shipped: Sequence[str]) -> dict:
    with tempfile.TemporaryDirectory() as name, served(args.weights, shipped) as (url, pid):
        found = load(url, pid, Path(name), args.readers, 60 * args.minutes, args.files, args.pause)
    return {f"load: {what}": value for what, value in found.items()}


def _page(args: argparse.Namespace, shipped: Sequence[str]) -> dict:
    chromium, results = shutil.which("chromium"), {}
    if chromium is None:
        raise SystemExit("There is no Chromium: apt-get install chromium")
    films = [png(2000, seed) for seed in tqdm(range(args.drops + 1), "drawing", leave=False)]
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        starts = [start(browser, args.weights, shipped) for _ in tqdm(range(args.starts), "starting", leave=False)]
        results["start of the server to the page, median, s"] = float(np.median(starts))
        for models in dict.fromkeys((shipped[:3], shipped)):  # one, if these are all
            with served(args.weights, models) as (url, pid):
                found = one_reader(opened(browser, url), folder, films)
                results |= {f"{len(models)} networks: {what}": value for what, value in found.items()}
                if models == shipped:
                    results |= large_film(opened(browser, url), folder, args.side, args.drops)
                    results |= many_users(url, pid, folder, args.users, args.seconds) if args.users else {}
                    results |= archive(url, pid, folder, args.files) if args.files else {}
        browser.close()
    return results


if __name__ == "__main__":
    main()
