"""The web page: python app.py [--host 127.0.0.1] [--port 7860] [--weights weights]."""

import argparse
import base64
import gc
import io
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
gc.disable()  # imports make many objects and hardly any garbage: looking for it takes a second of the start

with patch("inspect.getfile", side_effect=OSError):  # or Gradio parses and rewrites its own type stubs, for two seconds
    import gradio as gr

from manet_core import CLASSES, Analysis, WeightsError, XRay, XRayError, list_models  # noqa: E402
from manet_core.networks.registry import split_name  # noqa: E402
from manet_core.phantom import phantom  # noqa: E402
from manet_core.preprocess import resize  # noqa: E402
from manet_core.report import save_report  # noqa: E402
from ui import batch, render  # noqa: E402
from ui.models import models_page  # noqa: E402
from ui.networks import Networks  # noqa: E402
from ui.teach import teach_tab  # noqa: E402
from ui.uploads import Uploads  # noqa: E402

gc.freeze()
gc.enable()

PHANTOMS = {"Clear lungs": (0, 0.0), "Faint shadow": (1, 0.5), "Dense shadow": (2, 1.0)}  # name: (seed, opacity)
KEEP_S = 1800  # seconds for which a result waits for another class to be chosen, or for a report
KEEP_SIDE = 1024  # pixels of it
LONGEST_NOTE = 600  # characters
ONE_AT_A_TIME = {"concurrency_id": "networks", "concurrency_limit": 1}
WINDOW = """
(centre, width, inverted) => {
  const slope = (inverted ? -1 : 1) / width;
  for (const channel of document.querySelectorAll('#window feComponentTransfer > *')) {
    channel.setAttribute('slope', slope);
    channel.setAttribute('intercept', 0.5 - slope * centre);
  }
}
"""
FULL_SCREEN = """
element.addEventListener('click', event => {
  const picture = event.target.closest('.zoom');
  if (picture) document.fullscreenElement ? document.exitFullscreen() : picture.requestFullscreen();
});
"""


def sets(variable: str, value: str = "value") -> str:
    """JavaScript that sets a CSS variable of the page to an expression of a control's `value`."""
    return f"value => document.querySelector('.gradio-container').style.setProperty('{variable}', {value})"


def build(weights: str | Path, upload_folder: str | Path, models: list[str] | None = None) -> gr.Blocks:
    """The page.

    Args:
        weights: folder with manifest.json.
        upload_folder: where Gradio stores uploads.
        models: the classifiers to ask; None: all that have weights.
    """
    results = Path(weights).parent / "results"
    networks, uploads = Networks(weights, models), Uploads(upload_folder)

    def look_for_weights() -> str:
        try:
            networks.get()
        except WeightsError as error:
            return render.alert("No analysis is possible", [str(error)])
        return gr.skip()

    def analyze(file: gr.FileData) -> dict:
        """Lung segmentation and classification of one frontal chest X-ray; research and teaching only.

        Args:
            file: the X-ray, one PNG, JPEG, TIFF, BMP, WebP or DICOM file.

        Returns:
            {"readings": {model: {"probabilities": {class: 0 to 1}, "predicted": class,
            "in_lung": {class: 0 to 1}}}, "lung_area": 0 to 1, "lung_areas": {"right", "left"}, "height", "width",
            "distance": from the training X-rays, about 1 for one of them, or null,
            "warnings": [sentence], "disclaimer"}; no pixels, nothing about the patient.
        """
        try:
            return networks.analyze(uploads.read(file)).to_dict()
        except (XRayError, WeightsError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def analyze_many(files: list[gr.FileData]) -> list[dict]:
        """Analysis of many X-rays, in their order; a zip archive counts as the files in it.

        Args:
            files: PNG, JPEG, TIFF, BMP, WebP, DICOM or zip files.

        Returns:
            For each file {"file": its name} and what `/analyze` returns, or {"file", "error": a sentence}.
        """
        try:
            *_, (rows, _) = batch.read_all(networks, uploads, files)
        except (XRayError, WeightsError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return json.loads(batch.as_json(rows))

    def list_networks() -> list[dict]:
        """The networks that are asked.

        Returns:
            [{"name", "backbone", "attention": "", "ma" or "cbam", "classes", "input_size": pixels,
            "temperature", "sha256": of the weights, and after a "+" of their refitted last layer}]
        """
        try:
            pipeline = networks.get()
        except WeightsError as error:
            raise gr.Error(str(error), print_exception=False) from None
        found = []
        for name in pipeline.models:
            entry, (backbone, attention) = pipeline.entries[name], split_name(name)
            found.append(
                {
                    "name": name,
                    "backbone": backbone,
                    "attention": attention,
                    "classes": entry["classes"],
                    "input_size": entry["preprocessing"]["size"],
                    "temperature": entry.get("temperature", 1.0),
                    "sha256": pipeline.hashes[name],
                }
            )
        return found

    def answer(read: Callable[[], XRay], quiz: bool, *view: str) -> Iterator[dict]:
        """What the page shows, stage by stage, of the X-ray that `read` returns."""
        yield {
            status: render.stage("Reading the picture …"),
            pictures: "",
            headline: gr.update(visible=False),
            result: gr.update(visible=False),
            quiz_panel: gr.update(visible=False),
            verdict: "",
            found: None,
            saved: "",
        }
        try:
            x = read()
            yield {status: render.stage("Waking the networks …"), drop: None}
            pipeline = networks.get()
            count = len(pipeline.models)
            yield {status: render.stage(f"Finding the lungs and asking {count} networks …")}
            analysis = networks.analyze(x)
        except (XRayError, WeightsError) as error:
            yield {status: render.alert("Not analysed", [str(error)]), pictures: render.EMPTY, drop: None}
            return
        except Exception:
            logging.exception("The analysis failed.")
            sentence = "The analysis failed, and the server's log says why; try another picture."
            yield {status: render.alert("Not analysed", [sentence]), pictures: render.EMPTY, drop: None}
            return
        yield {
            status: render.alert("Warning", analysis.warnings),
            pictures: render.pictures(analysis),
            headline: gr.update(visible=not quiz),
            result: gr.update(visible=not quiz),
            quiz_panel: gr.update(visible=quiz),
            guess: None,
            summary: render.summary(analysis.readings),
            cards: render.cards(analysis.readings, render.View(*view)),
            notes: render.notes(analysis.readings),
            found: replace(analysis, original=resize(analysis.original, render.fit(x.pixels.shape, KEEP_SIDE))),
        }

    def answer_upload(file: dict, quiz: bool, *view: str) -> Iterator[dict]:
        yield from answer(lambda: uploads.read(file), quiz, *view)

    def answer_phantom(seed: int, opacity: float, quiz: bool, *view: str) -> Iterator[dict]:
        yield from answer(lambda: phantom(seed=seed, opacity=opacity), quiz, *view)

    def reveal(analysis: Analysis | None, guess: str, score: tuple[int, int]) -> dict:
        if analysis is None:
            expired = render.alert("The result has expired", ["Drop the X-ray again."])
            return {quiz_panel: gr.update(visible=False), verdict: expired}
        score = (score[0] + (guess in analysis.leading), score[1] + 1)
        return {
            quiz_panel: gr.update(visible=False),
            headline: gr.update(visible=True),
            result: gr.update(visible=True),
            verdict: render.verdict(guess, analysis.votes, score),
            score_state: score,
        }

    def redraw(analysis: Analysis | None, *view: str) -> str:
        if analysis is None:
            return render.alert("The heatmaps have expired", ["Drop the X-ray again to see other classes."])
        return render.cards(analysis.readings, render.View(*view))

    def report(analysis: Analysis | None, note: str, kind: str) -> str:
        if analysis is None:
            return render.alert("The result has expired", ["Drop the X-ray again to save a report."])
        page = io.BytesIO()
        save_report(analysis, page, note=note[:LONGEST_NOTE], hashes=networks.get().hashes, format=kind)
        data = base64.b64encode(page.getvalue()).decode()
        name, media = f"MANet.{kind}", {"pdf": "application/pdf", "png": "image/png"}[kind]
        return f'<a download="{name}" href="data:{media};base64,{data}">Save {name} again</a>'

    def forget(request: gr.Request) -> None:
        """Drop what the server keeps of a page that was closed."""
        demo.state_holder.delete_state(request.session_hash)
        demo.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title="MANet", analytics_enabled=False, fill_width=True, delete_cache=(60, 600)) as demo:
        html = partial(gr.HTML, apply_default_css=False)
        html(render.HEADER + render.WINDOW)
        found = gr.State(time_to_live=KEEP_S)  # the Analysis, its original no larger than needed to show it
        score_state = gr.State((0, 0))  # of “read first”: agreements with the networks, X-rays read
        with gr.Tabs():
            with gr.Tab("Second opinion"):
                with gr.Row(equal_height=True):
                    drop = gr.File(label="X-ray", show_label=False, height=76, scale=3, elem_id="drop")
                    with gr.Column(scale=2, elem_classes="phantoms"):
                        html("<p>No X-ray at hand? Try a drawing: <b>synthetic phantom, not a person.</b></p>")
                        with gr.Row(equal_height=True):
                            buttons = {name: gr.Button(name, size="sm", min_width=90) for name in PHANTOMS}
                        quiz = gr.Checkbox(label="Read first, then see the networks’ answers", container=False)
                status = html(elem_id="status")
                with gr.Row(visible=False, equal_height=True) as quiz_panel:
                    guess = gr.Radio(list(CLASSES), label="What do you see? Then the networks’ answers appear.")
                verdict = html(elem_id="verdict")
                with gr.Column(visible=False) as headline:
                    summary = html(elem_id="summary")
                pictures = html(render.EMPTY, elem_id="pictures", js_on_load=FULL_SCREEN)
                with gr.Column(visible=False) as result:
                    html(render.LIMITS)
                    with gr.Row(equal_height=True):
                        explain = gr.Radio(
                            render.EXPLAIN, value=render.PREDICTED, label="Heatmaps of", scale=5, elem_id="explain"
                        )
                        opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity", min_width=180, buttons=[])
                    with gr.Accordion("Window, colours, scale", open=False, elem_id="view"):
                        with gr.Row(equal_height=True):
                            centre = gr.Slider(0, 1, 0.5, step=0.01, label="Window centre", buttons=[])
                            width = gr.Slider(0.05, 2, 1, step=0.01, label="Window width", buttons=[])
                            inverted = gr.Checkbox(label="Invert the X-ray", min_width=120)
                            outlined = gr.Checkbox(label="Draw the mask’s outline", min_width=120)
                            on_lungs = gr.Checkbox(label="Heatmaps over the lungs alone", min_width=120)
                        with gr.Row(equal_height=True):
                            colours = gr.Radio(render.COLOUR_MAPS, value=render.COLOUR_MAP, label="Colours of heatmaps")
                            scale = gr.Radio(render.SCALES, value=render.OWN, label="Scale of heatmaps")
                    cards = html(elem_id="cards", js_on_load=FULL_SCREEN)
                    notes = html(elem_id="notes")
                    with gr.Accordion("Report on one page", open=False, elem_id="report"):
                        note = gr.Textbox(
                            label="Note, printed on the report and kept nowhere", lines=2, max_length=LONGEST_NOTE
                        )
                        with gr.Row():
                            save = {kind: gr.Button(f"Save as {kind.upper()}", size="sm") for kind in ("pdf", "png")}
                        saved = html(elem_id="saved")
            with gr.Tab("Compare attention") as teach:
                teach_tab(networks, found, teach)
            with gr.Tab("Many X-rays"):
                batch.batch_tab(networks, uploads)
            with gr.Tab("Models"):
                html(models_page(weights, results))
        view = [explain, colours, scale]  # the fields of render.View

        gr.on(  # at once, in the browser: other people's X-rays may be ahead in the queue
            [drop.upload, *(button.click for button in buttons.values())],
            None, None, status, js=f"() => {json.dumps(render.stage('Waiting for its turn …'))}",
            trigger_mode="multiple", api_visibility="private",
        )  # fmt: skip
        outputs = [drop, status, verdict, headline, summary, pictures, result, cards, notes, found, saved]
        outputs += [quiz_panel, guess]
        event = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"} | ONE_AT_A_TIME
        drop.upload(answer_upload, [drop, quiz, *view], preprocess=False, trigger_mode="multiple", **event)
        for name, button in buttons.items():
            button.click(partial(answer_phantom, *PHANTOMS[name]), [quiz, *view], **event)
        guess.input(
            reveal, [found, guess, score_state], [headline, result, quiz_panel, verdict, score_state], queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        gr.on(
            [control.input for control in view], redraw, [found, *view], cards, queue=False,
            show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
        for kind, button in save.items():
            make = partial(report, kind=kind)
            made = button.click(make, [found, note], saved, queue=False, api_visibility="private")
            made.then(None, js="() => document.querySelector('#saved a')?.click()", api_visibility="private")
        in_browser = {"fn": None, "api_visibility": "private"}
        opacity.input(inputs=opacity, js=sets("--heat"), **in_browser)
        gr.on([c.input for c in (centre, width, inverted)], inputs=[centre, width, inverted], js=WINDOW, **in_browser)
        outlined.input(inputs=outlined, js=sets("--outline", "value ? 'block' : 'none'"), **in_browser)
        on_lungs.input(inputs=on_lungs, js=sets("--under", "value ? 'var(--lungs)' : 'var(--whole)'"), **in_browser)
        demo.load(look_for_weights, None, status, show_progress="hidden", api_visibility="private")
        demo.unload(forget)
        gr.api(analyze, api_name="analyze", **ONE_AT_A_TIME)
        gr.api(analyze_many, api_name="batch", concurrency_id="batches")
        gr.api(list_networks, api_name="models")
    return demo


def dark_theme() -> gr.themes.Base:
    """Greys and one accent, with the system's fonts; dark in light mode too, as X-rays are read in the dark."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.cyan,
        neutral_hue=gr.themes.colors.gray,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill_dark="#0e1114",
        block_background_fill_dark="#171c21",
        block_border_color_dark="#323a43",
        button_secondary_background_fill_dark="#242c34",
        button_secondary_background_fill_hover_dark="#323a43",
        checkbox_label_background_fill_dark="#242c34",
        checkbox_label_background_fill_hover_dark="#323a43",
        checkbox_background_color_selected_dark="#1b8ba3",
        slider_color_dark="#6cc5d9",
        input_background_fill_dark="#242c34",
    )
    for name, value in list(vars(theme).items()):
        if name.endswith("_dark") and value is not None:
            setattr(theme, name.removesuffix("_dark"), value)
    return theme


def accounts(path: Path) -> list[tuple[str, str]]:
    """(name, password) of each line NAME:PASSWORD of a file.

    Raises:
        SystemExit: the file cannot be read, or a line is none of these; the text says what to do.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise SystemExit(f"{path} cannot be read; give a text file with a line NAME:PASSWORD for each user.") from None
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise SystemExit(f"{path} needs a line NAME:PASSWORD for each user, and nothing else.")
    return pairs


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--weights", default=Path(__file__).parent / "weights", help="folder with manifest.json")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list_models(),
        metavar="MODEL",
        help="ask these alone (default: all with weights)",
    )
    parser.add_argument(
        "--auth", type=Path, metavar="FILE", help="ask for a name and password, a line NAME:PASSWORD each"
    )
    parser.add_argument("--mcp", action="store_true", help="also serve the endpoints to language models, by MCP")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end, which deletes the temporary folder
    auth = accounts(args.auth) if args.auth else None
    with tempfile.TemporaryDirectory(prefix="manet-") as folder:
        folder = os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        demo = build(args.weights, folder, args.models)
        print(f"MANet: http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
        try:
            demo.launch(
                server_name=args.host, server_port=args.port, share=False, quiet=True, run_history=False,
                enable_monitoring=False, footer_links=[], max_file_size="200mb", ssr_mode=False,
                state_session_capacity=64, theme=dark_theme(), css_paths=render.STYLE,
                auth=auth, mcp_server=args.mcp,
            )  # fmt: skip
        except KeyboardInterrupt:  # while starting; later Gradio ends by itself
            pass
        except ImportError as error:
            raise SystemExit("--mcp needs one package more: pip install 'gradio[mcp]'") from error
        except OSError as error:
            raise SystemExit(f"The page cannot be served at {args.host}:{args.port}; choose another --port.") from error


if __name__ == "__main__":
    main()
