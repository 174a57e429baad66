"""The viewer, driven as a reader would: by wheel, mouse, fingers and keys."""

import json
import re
import shutil

import numpy as np
import pydicom
import pytest
from conftest import BROWSER_ARGS, WAIT_S, expect, wait_until
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from manet_core import load_xray
from manet_core.phantom import phantom

SIZE = (300, 240)  # rows, columns
# What is drawn, read back from the canvas: (R, G, B) of places of the stage, given in CSS pixels.
_PIXELS = """
places => new Promise(done => requestAnimationFrame(() => {
  const viewer = document.querySelector('.viewer'), stage = viewer.querySelector('.stage'), seen = viewer.drawn;
  stage.dispatchEvent(new PointerEvent('pointermove', {pointerId: 99}));  // draws the film once more
  const look = () => {
    if (viewer.drawn === seen) return requestAnimationFrame(look);
    const canvas = stage.querySelector('canvas'), scale = canvas.width / stage.clientWidth;
    const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
    pen.drawImage(canvas, 0, 0);
    done(places.map(([x, y]) => [...pen.getImageData(x * scale, y * scale, 1, 1).data].slice(0, 3)));
  };
  requestAnimationFrame(look);
}))
"""


def _dicom(path, stored: np.ndarray, **elements):
    """A film of 16 bits, MONOCHROME2, with further `elements` of the header."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = "DX", 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelRepresentation, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 0, 16, 16, 15
    dataset.PixelData = stored.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A chest whose brightest tenth hides a square that is 40 of 65,535 levels brighter."""
    stored = phantom(300, seed=1).pixels[:, :240] * 30_000
    stored[:60, :60] = 60_000
    stored[20:40, 20:40] += 40
    folder = tmp_path_factory.mktemp("films")
    return _dicom(folder / "deep.dcm", stored, PixelSpacing=[0.5, 0.25], WindowCenter=32768, WindowWidth=65536)


@pytest.fixture(scope="module")
def desk(server, chromium, film):
    """A page that shows the film and its reading; each test begins with it unchanged."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720}, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_S)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(server[0])
    page.set_input_files("#drop input[type=file]", film)
    page.wait_for_selector(".toolbar button:text-is('Mask'):enabled")
    page.film = page.get_attribute("[data-film]", "data-film")
    yield page
    assert page.faults == []
    context.close()


@pytest.fixture
def page(desk):
    """`desk`, as after the film was read."""
    desk.focus(".stage")
    desk.keyboard.press("Escape")
    for key in ("a", "0", "r", *["Backspace"] * 3):
        desk.keyboard.press(key)
    for name in ("Heatmap", "Mask", "Outline", "Lungs"):
        if desk.get_attribute(f".toolbar button:text-is('{name}')", "aria-pressed") == "true":
            desk.click(f".toolbar button:text-is('{name}')")
    desk.mouse.move(0, 0)
    return desk


def _box(page) -> dict:
    return page.locator(".stage").bounding_box()


def _spot(page, row: float, column: float, pane: int = 0, panes: int = 1) -> tuple[float, float]:
    """Where a point of the film, which fits its pane, is on the page."""
    box = _box(page)
    width = (box["width"] - 2 * (panes - 1)) / panes
    scale = min(width / SIZE[1], box["height"] / SIZE[0])
    left = box["x"] + pane * (width + 2) + width / 2
    return left + (column - SIZE[1] / 2) * scale, box["y"] + box["height"] / 2 + (row - SIZE[0] / 2) * scale


def _under(page, x: float, y: float) -> tuple[int, int, float]:
    """Row, column and value that the page tells of the pointer's place."""
    page.mouse.move(x, y)
    page.wait_for_function("document.querySelector('.place').textContent")
    words = page.inner_text(".place").replace(",", "").replace(":", "").split()
    return int(words[1]), int(words[3]), float(words[4])


def _pixels(page, places: list[tuple[float, float]]) -> list[list[int]]:
    box = _box(page)
    return page.evaluate(_PIXELS, [[x - box["x"], y - box["y"]] for x, y in places])


def _pixel(page, x: float, y: float) -> list[int]:
    return _pixels(page, [(x, y)])[0]


def _zoom(page) -> int:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return int(page.inner_text(".zoom-text").split("%")[0])


def _drag(page, start, end, button: str = "left") -> None:
    page.mouse.move(*start)
    page.mouse.down(button=button)
    page.mouse.move(*end, steps=4)
    page.mouse.up(button=button)


def test_the_film_has_most_of_the_first_screen(page):
    box = _box(page)
    assert box["width"] * box["height"] > 0.4 * 1280 * 720 and box["y"] + box["height"] <= 720
    beside = page.locator("#summary").bounding_box()
    assert beside["x"] >= box["x"] + box["width"] and beside["y"] < 400
    assert page.locator(".readings").bounding_box()["y"] < 720
    page.keyboard.press("h")
    assert page.locator(".explained").bounding_box()["y"] < 720
    assert page.is_visible(".explained >> text=Heatmap of")


def test_the_pointer_tells_place_and_stored_value(page, film):
    stored = pydicom.dcmread(film).pixel_array
    for row, column in ((30.5, 30.5), (150.5, 100.5), (290.5, 200.5)):
        told = _under(page, *_spot(page, row, column))
        assert told == (int(row), int(column), stored[int(row), int(column)])


def test_wheel_zooms_at_the_pointer(page):
    place, before = _spot(page, 100.5, 60.5), _zoom(page)
    for delta in (-300, -300, 200):
        page.mouse.move(*place)
        page.mouse.wheel(0, delta)
        assert _under(page, *place)[:2] == (100, 60)
    assert _zoom(page) > 1.5 * before
    page.keyboard.press("0")
    assert _zoom(page) == before
    page.keyboard.press("1")
    assert _zoom(page) == 100


def test_drag_moves_the_film_with_the_pointer(page):
    page.keyboard.press("+")
    start = _spot(page, 150, 120)
    end = (start[0] + 80, start[1] - 50)
    known = _under(page, *start)
    _drag(page, start, end)
    moved = _under(page, *end)
    assert abs(moved[0] - known[0]) <= 1 and abs(moved[1] - known[1]) <= 1
    page.keyboard.press("Shift+ArrowLeft")
    assert _under(page, end[0] + 60, end[1])[:2] == pytest.approx(moved[:2], abs=1)


def test_window_reaches_the_lowest_bits(page):
    """40 levels of 65,536 are less than one of 256: only the full range can show them."""
    inside, outside = _spot(page, 30, 30), _spot(page, 50, 50)
    assert np.abs(np.subtract(_pixel(page, *inside), _pixel(page, *outside))).max() <= 1
    page.evaluate(
        """for (const [name, value] of [['width', 80], ['level', 60020]]) {
          const slider = document.querySelector(`[name=${name}]`);
          slider.value = value;
          slider.dispatchEvent(new Event('input', {bubbles: true}));
        }"""
    )
    page.wait_for_selector(".window-text >> text=centre 60020, width 80")
    assert _pixel(page, *inside)[0] - _pixel(page, *outside)[0] > 100
    assert page.inner_text(".badge") == "windowed"


def test_right_drag_and_keys_set_the_window(page):
    def numbers() -> tuple[float, float]:
        _zoom(page)
        words = page.inner_text(".window-text").replace(",", "").split()
        return float(words[1]), float(words[3])

    first, start = numbers(), _spot(page, 150, 120)
    _drag(page, start, (start[0] - 200, start[1]), "right")
    centre, width = numbers()
    assert centre == first[0] and width < 0.8 * first[1] and page.inner_text(".badge") == "windowed"
    _drag(page, start, (start[0], start[1] + 60), "right")
    assert numbers()[0] > centre
    page.keyboard.press("[")
    assert numbers()[1] < width
    page.keyboard.press(",")
    page.keyboard.press("r")
    assert numbers() == first and page.inner_text(".badge") == ""


def test_inverting_shows_a_badge(page):
    place = _spot(page, 10, 10)  # bright
    before = _pixel(page, *place)
    page.keyboard.press("i")
    assert _pixel(page, *place) == [255 - grey for grey in before]
    assert page.inner_text(".badge") == "inverted"
    assert page.get_attribute("button:text-is('Invert')", "aria-pressed") == "true"


def test_overlays_do_not_move_the_view(page):
    place = _spot(page, 150, 70)
    page.mouse.move(*place)
    page.mouse.wheel(0, -300)
    known, seen = _under(page, *place), []
    for key in "hmol":
        before = page.locator(".stage canvas").screenshot()
        page.keyboard.press(key)
        _zoom(page)
        seen.append(page.locator(".stage canvas").screenshot())
        assert seen[-1] != before and _under(page, *place) == known, key
    page.click(".readings [data-network=efficientnet_lite0_ma][data-name=Normal]")
    page.wait_for_selector(".explained >> text=Heatmap of Normal by EfficientNet-Lite0, mask attention (MA)")
    assert _under(page, *place) == known
    slider = page.locator("[name=opacity]")
    before = page.locator(".stage canvas").screenshot()
    slider.fill("0.1")
    _zoom(page)
    assert page.locator(".stage canvas").screenshot() != before


def test_arrows_turn_networks_and_classes(page):
    page.click(".readings thead [data-network=efficientnet_lite0]")
    page.focus(".stage")
    page.keyboard.press("h")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".explained >> text=Heatmap of Normal by EfficientNet-Lite0, mask attention (MA)")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.wait_for_selector(".explained >> text=Heatmap of Viral pneumonia")
    assert page.locator(".readings [aria-pressed=true]").get_attribute("data-name") == "Viral pneumonia"


def test_panes_move_together(page):
    page.keyboard.press("s")
    expect(page.locator(".labels p")).to_have_count(4)
    corners = [label.bounding_box() for label in page.locator(".labels p").all()]
    places = [(corner["x"] + 100, corner["y"] + 120) for corner in corners]
    page.mouse.move(*places[0])
    page.mouse.wheel(0, -400)
    known = _under(page, *places[0])
    for place in places[1:]:
        assert _under(page, *place)[:2] == pytest.approx(known[:2], abs=1)
    assert _pixel(page, *places[1]) in ([0, 0, 0], [255, 255, 255])


def test_a_heatmap_is_seen_beside_its_mean(page):
    """And where no mean is known, nothing is said of one."""
    page.click(".readings thead [data-network=efficientnet_lite0_cbam]")
    expect(page.locator(".toolbar button:text-is('Mean')")).to_be_hidden()
    page.focus(".stage")
    page.keyboard.press("e")
    expect(page.locator(".labels p")).to_have_count(1)
    for button in page.locator(".readings [data-network=efficientnet_lite0_ma][data-name]").all():
        button.click()
        _zoom(page)
        if page.is_visible(".toolbar button:text-is('Mean')"):  # there is evidence for that class
            break
    page.click(".toolbar button:text-is('Mean')")
    expect(page.locator(".labels b")).to_have_text(["This film", "Mean of 123 X-rays", "Difference"])
    expect(page.locator(".labels p").first).to_contain_text("half of 123 validation X-rays: 0.50 or more")
    page.locator("[name=opacity]").fill("0.6")
    places = [(30, 24), (270, 216)]  # where the mean is strong, and where it is not
    strong, weak = (_pixel(page, *_spot(page, *place, pane=1, panes=3)) for place in places)
    assert strong[0] > strong[2] + 50 and abs(weak[0] - weak[2]) < 30
    page.click(".toolbar button:text-is('Film')")
    expect(page.locator(".labels p")).to_have_count(1)


def test_ruler_measures_millimetres(page):
    page.keyboard.press("d")
    _drag(page, _spot(page, 100, 60), _spot(page, 180, 120))  # 80 rows of 0.5 mm, 60 columns of 0.25 mm
    _zoom(page)
    (text,) = page.locator(".stage svg text").all_text_contents()
    assert float(text.removesuffix(" mm")) == pytest.approx(np.hypot(40, 15), abs=0.3)
    page.keyboard.press("Backspace")
    _zoom(page)
    expect(page.locator(".stage svg text")).to_have_count(0)


def test_heart_and_thorax_give_their_ratio(page):
    page.click("button:text-is('CTR')")
    page.wait_for_selector(".measured >> text=Draw the greatest width of the heart.")
    _drag(page, _spot(page, 200, 80), _spot(page, 205, 140))
    page.wait_for_selector(".measured >> text=Draw the greatest width of the thorax.")
    _drag(page, _spot(page, 220, 40), _spot(page, 220, 190))
    page.wait_for_selector(".measured >> text=Cardiothoracic ratio 0.40 (15.")
    expect(page.locator("button:text-is('CTR')")).to_have_attribute("aria-pressed", "false")


def test_full_screen_keeps_everything(page):
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement?.id === 'desk'")
    page.wait_for_function("document.querySelector('.stage').clientHeight > 500")
    assert page.is_visible(".readings") and page.is_visible(".toolbar") and page.is_visible(".sliders")
    page.keyboard.press("f")
    page.wait_for_function("!document.fullscreenElement")


def test_keys_are_listed_and_belong_to_the_viewer(page):
    page.keyboard.press("?")
    assert page.is_visible(".help-keys >> text=zoom at the pointer")
    page.keyboard.press("Escape")
    assert not page.is_visible(".help-keys")
    page.focus("button[role=tab]:has-text('Models')")
    page.keyboard.press("i")
    assert page.inner_text(".badge") == ""
    page.focus(".toolbar button:text-is('Film')")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "Stages"
    stops = "[...document.querySelectorAll('.toolbar button')].filter(button => button.tabIndex === 0).length"
    assert page.evaluate(stops) == 1


def test_two_fingers_zoom(page):
    box, before = _box(page), _zoom(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *apart: float) -> None:
        points = (
            [{"x": x + side * apart[0], "y": y, "id": number} for number, side in enumerate((-1, 1))] if apart else []
        )
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 40)
    for apart in (60, 90, 120):
        touch("touchMove", apart)
    touch("touchEnd")
    assert _zoom(page) == pytest.approx(3 * before, rel=0.1)


def test_the_next_film_is_seen_as_it_is_and_the_last_ones_stay(page, server):
    page.keyboard.press("i")
    page.keyboard.press("+")
    page.wait_for_selector(".badge >> text=inverted")
    before = page.inner_text("#read")
    page.click("button:has-text('Dense shadow')")
    page.wait_for_selector("#read >> text=phantom, dense shadow")
    expect(page.locator(".badge")).to_have_text("")
    expect(page.locator(".strip li")).to_have_count(2)
    page.click(".strip button[title='Show deep.dcm']")
    page.wait_for_selector("#read >> text=deep.dcm")
    assert page.inner_text("#read") == before and page.inner_text(".badge") == "inverted"
    page.keyboard.press("i")

    page.click(".strip button:text-is('beside')")  # the phantom: two films, one view, their claims
    expect(page.locator(".labels p")).to_have_count(2)
    box = _box(page)
    middle = (box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.wheel(0, -400)
    assert _under(page, *middle)[:2] == pytest.approx((150, 120), abs=1)
    assert _under(page, middle[0] + box["width"] / 2 + 1, middle[1])[:2] == pytest.approx((256, 256), abs=2)
    page.click(".strip button:text-is('close')")
    expect(page.locator(".labels p")).to_have_count(1)

    page.click(".strip button[title='Show phantom, dense shadow']")
    page.wait_for_selector("#read >> text=phantom, dense shadow")  # whose layers are the last that come
    for key, shown in (("of no film", "phantom, dense shadow"), (page.film, "deep.dcm")):  # one is asked of, so shown
        told = json.dumps({"open": key, "films": []})
        page.evaluate("told => dispatchEvent(new CustomEvent('manet-films', {detail: told}))", told)
        expect(page.locator(".strip [aria-current=true]")).to_have_attribute("title", f"Show {shown}")
    page.keyboard.press("+")
    zoom = _zoom(page)
    page.evaluate("told => dispatchEvent(new CustomEvent('manet-films', {detail: told}))", told)
    assert _zoom(page) == zoom, "the one that is shown already stays as it is"
    page.click(".strip button[title='Show deep.dcm']")
    page.wait_for_selector("#read >> text=deep.dcm")


def _strip(page) -> list[str]:
    return page.locator(".strip li > button:first-child").all_inner_texts()


def test_a_reload_loses_nothing(page, server, chromium):
    """Films, the reading of the one that was shown and the strip are back, and no network was asked again."""
    page.reload()
    page.wait_for_selector(".toolbar button:text-is('Mask'):enabled")
    if len(_strip(page)) < 2:
        page.click("button:has-text('Faint shadow')")
        page.wait_for_selector("#read >> text=phantom, faint shadow")
        page.wait_for_selector(".strip button[title='Show deep.dcm']")
        page.click(".strip button[title='Show deep.dcm']")
    page.wait_for_selector("#read >> text=deep.dcm")
    page.wait_for_selector(".readings")
    read, table, films = page.inner_text("#read"), page.inner_text(".readings"), _strip(page)
    drawn = _pixels(page, [_spot(page, row, 120) for row in range(20, 300, 40)])

    page.reload()
    page.wait_for_selector(".toolbar button:text-is('Mask'):enabled")
    assert page.inner_text("#read") == read  # with the moment at which it was read, and a hash of its pixels
    assert page.inner_text(".readings") == table
    wait_until(lambda: _strip(page) == films)
    assert _pixels(page, [_spot(page, row, 120) for row in range(20, 300, 40)]) == drawn
    assert page.get_attribute(".strip button[title='Show deep.dcm']", "aria-current") == "true"

    page.locator(".strip .side").first.click()  # beside the film, with what its networks say
    expect(page.locator(".labels p")).to_have_count(2)
    wait_until(lambda: len(page.locator(".labels p").nth(1).inner_text().split("\n")[0].split(" ")) > 3)
    page.click(".strip button:text-is('close')")
    assert page.inner_text("#read") == read

    kept = page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie, location.href]")
    assert list(kept[1]) == ["manet"] and re.fullmatch(r"[\w-]{43}", kept[1]["manet"])
    assert "deep" not in json.dumps(kept) and kept[0] == {}

    other = chromium.new_page()  # of another tab, and one with a token that the server never made
    try:
        for token in ("", "x" * 43):
            other.goto(server[0])
            other.evaluate("token => token && sessionStorage.setItem('manet', token)", token)
            other.reload()
            other.wait_for_function("old => sessionStorage.getItem('manet') !== old", arg=token or None)
            assert other.is_visible("text=Drop a frontal chest X-ray here") and other.locator(".readings").count() == 0
            assert other.evaluate("sessionStorage.getItem('manet')") not in (token, kept[1]["manet"])
    finally:
        other.close()


def test_the_keyboard_skips_to_the_film(page):
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "stage"


def test_no_fault_of_access(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page.keyboard.press("s")
    page.keyboard.press("?")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        found = axe.Axe().run(page).response["violations"]
        assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")] == []


def test_both_renderers_draw_the_same(server, chromium, film):
    """WebGL2, here in software, and the processor."""
    args = [*BROWSER_ARGS, "--enable-unsafe-swiftshader", "--use-angle=swiftshader"]
    browser = chromium.browser_type.launch(executable_path=shutil.which("chromium"), args=args)
    drawn = {}
    try:
        for renderer in ("webgl2", "processor"):
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.set_default_timeout(1000 * WAIT_S)
            if renderer == "webgl2":  # which the viewer would not choose if it knew that this is in software
                page.add_init_script("""
                  const own = WebGL2RenderingContext.prototype.getParameter;
                  WebGL2RenderingContext.prototype.getParameter = function(name) {
                    return name === 0x9246 ? 'a graphics processor' : own.call(this, name);
                  };
                  const make = WebGL2RenderingContext.prototype.createTexture;
                  window.textures = 0;
                  WebGL2RenderingContext.prototype.createTexture = function() {
                    textures++;
                    return make.call(this);
                  };""")
            page.goto(server[0])
            page.set_input_files("#drop input[type=file]", film)
            page.wait_for_selector(".toolbar button:text-is('Mask'):enabled")
            assert page.get_attribute(".viewer", "data-renderer") == renderer
            page.focus(".stage")
            places = [_spot(page, row, column) for row in range(15, 300, 15) for column in range(9, 240, 15)]
            for keys in ("h", "m", "mh", "l", "li", "s"):
                for key in keys:
                    page.keyboard.press(key)
                drawn.setdefault(keys, []).append(_pixels(page, places))
                if renderer == "webgl2":  # a frame more needs no texture more, whatever is shown
                    made = page.evaluate("textures")
                    _pixel(page, *places[0])
                    assert page.evaluate("textures") == made > 0, keys
            page.close()
    finally:
        browser.close()
    for keys, (gpu, processor) in drawn.items():
        off = np.abs(np.subtract(gpu, processor)).max(1)
        assert np.median(off) <= 2 and (off > 24).mean() < 0.08, keys  # edges are smoothed by the one alone


def test_a_real_film(server, chromium, index):
    """A film of a person, as JPEG: seen whole, its values those of the file."""
    path = index[index["split"] == "test"].image.iloc[0]
    stored = load_xray(path).stored
    page = chromium.new_page(viewport={"width": 1920, "height": 1080})
    try:
        page.set_default_timeout(1000 * WAIT_S)
        page.goto(server[0])
        with page.expect_response("**/film") as fetched:
            page.set_input_files("#drop input[type=file]", path)
        page.wait_for_selector(".toolbar button:text-is('Mask'):enabled")
        levels = np.frombuffer(fetched.value.body(), np.uint8)
        assert np.array_equal(levels, stored.levels.ravel())
        box = _box(page)
        row, column, value = _under(page, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert value == stored.first + stored.step * stored.levels[row, column]
        assert json.loads(page.evaluate("JSON.stringify(document.documentElement.scrollWidth)")) <= 1920
    finally:
        page.close()
