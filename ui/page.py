"""The page: its tabs, its endpoints, and what is forgotten when it is closed."""

from pathlib import Path

from . import batch, render
from .cases import CaseList
from .endpoints import add_endpoints
from .lecture import Lecture
from .models import models_page
from .networks import Networks, results_of
from .newest import Newest
from .opinion import OpinionTab
from .shelves import IDLE_S, Shelves
from .startup import gr
from .teach import teach_tab
from .uploads import Uploads
from .viewer import TOKEN


def build(
    weights: str | Path,
    upload_folder: str | Path,
    models: list[str] | None = None,
    shelves: Shelves | None = None,
    cases: CaseList | None = None,
) -> gr.Blocks:
    """The page.

    Args:
        weights: folder with manifest.json, or a manifest file.
        upload_folder: where Gradio stores uploads.
        models: the classifiers to run; None: all that have weights.
        shelves: where the films of pages are kept, to be fetched at `viewer.FETCH` from whoever serves that.
        cases: films that a lecturer prepared for students to read; None: none.
    """
    networks, uploads, shelves = Networks(weights, models), Uploads(upload_folder), shelves or Shelves()
    asked, compared, lectured = Newest(), Newest(), Newest()  # on the first tab, on the second, and by its projector

    def forget(request: gr.Request) -> None:
        """Drop what the server keeps of a page that was closed; its films wait a while for it to be reloaded."""
        for newest in (asked, compared, lectured):
            newest.forget(request.session_hash)
        shelves.left(request.session_hash)
        demo.state_holder.delete_state(request.session_hash)
        demo.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title="MANet", analytics_enabled=False, fill_width=True, delete_cache=(60, 600)) as demo:
        gr.HTML(render.HEADER, apply_default_css=False)
        found = gr.State(time_to_live=IDLE_S)  # the `Film` that the page shows
        with gr.Tabs():
            with gr.Tab("Second opinion"):
                opinion = OpinionTab(networks, uploads, asked, found, shelves, cases)
            with gr.Tab("Compare attention") as teach:
                Lecture(networks, lectured, found)
                teach_tab(networks, compared, found, teach)
            with gr.Tab("Many X-rays") as many:
                batch.batch_tab(networks, uploads)
            with gr.Tab("Models") as models_tab:
                gr.HTML(models_page(weights, *results_of(weights)), apply_default_css=False)
        restored = opinion.connect([teach, many, models_tab])
        demo.load(opinion.check_weights, None, opinion.status, show_progress="hidden", api_visibility="private")
        demo.load(
            opinion.restore, opinion.token, restored, js=TOKEN, queue=False, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        demo.unload(forget)
        add_endpoints(networks, uploads)
    return demo
