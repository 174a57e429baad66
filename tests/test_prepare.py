"""The index: validation of one that is there, and the public sets found in their published layouts."""

import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from manet_core.weights import read_manifest
from train import sources
from train.data import COLUMNS, read_index
from train.prepare import composition, credits, find, main, split, violations
from train.sources import Film, Source, convention_of, get_source, mask_group, register_source


def touch(path):
    """An empty file: prepare does not decode pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_mask(path, columns):
    """A 20×20 mask, white in the given columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((20, 20), np.uint8)
    pixels[:, columns] = 255
    Image.fromarray(pixels).save(path)


def kermany(root, people=40):
    for n in range(people):
        touch(root / f"train/PNEUMONIA/person{n}_bacteria_{2 * n}.jpeg")
        touch(root / f"train/PNEUMONIA/person{n}_bacteria_{2 * n + 1}.jpeg")
        touch(root / f"train/PNEUMONIA/person{n + people}_virus_{n}.jpeg")
        touch(root / f"train/NORMAL/IM-{n:04}-0001.jpeg")
        touch(root / f"train/NORMAL/NORMAL2-IM-{n:04}-0001.jpeg")
        touch(root / f"train/NORMAL/NORMAL2-IM-{n:04}-0001-0002.jpeg")


def prepared(monkeypatch, root, out, *options):
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", str(root), "--out", str(out), *options])
    main()
    return read_index(out)


@pytest.fixture
def public(tmp_path):
    """All four sets, small, at different depths."""
    root = tmp_path / "data"
    kermany(root / "downloads/chest_xray")
    for n in range(30):
        touch(root / f"nlm/ChinaSet_AllFiles/CXR_png/CHNCXR_{n:04}_{n % 2}.png")
        touch(root / f"MontgomerySet/CXR_png/MCUCXR_{n:04}_{n % 2}.png")
        write_mask(root / f"MontgomerySet/ManualMask/leftMask/MCUCXR_{n:04}_{n % 2}.png", slice(2, 8))
        write_mask(root / f"MontgomerySet/ManualMask/rightMask/MCUCXR_{n:04}_{n % 2}.png", slice(12, 18))
    touch(root / "nlm/mask/CHNCXR_0003_1_mask.png")
    covid = root / "covid-chestxray-dataset"
    rows = [
        ("2", "Pneumonia/Viral/COVID-19", "PA", "X-ray", "a.jpg"),
        ("2", "COVID-19", "AP Supine", "X-ray", "b.jpg"),
        ("3", "COVID-19, ARDS", "AP semi erect", "X-ray", "c.jpg"),
        ("4", "COVID-19", "L", "X-ray", "lateral.jpg"),
        ("4", "COVID-19", "Axial", "CT", "ct.jpg"),
        ("5", "Pneumonia/Bacterial/Streptococcus", "PA", "X-ray", "d.jpg"),
        ("6", "Pneumonia/Viral/SARS", "AP", "X-ray", "e.jpg"),
        ("7", "Pneumonia", "PA", "X-ray", "f.jpg"),
        ("8", "No Finding", "PA", "X-ray", "g.jpg"),
    ]
    for row in rows:
        touch(covid / "images" / row[-1])
    rows.append(("9", "COVID-19", "PA", "X-ray", "absent.jpg"))
    table = pd.DataFrame(rows, columns=["patientid", "finding", "view", "modality", "filename"])
    table.to_csv(covid / "metadata.csv", index=False)
    return root


def test_public_sets_get_their_labels_patients_and_masks(public, tmp_path, monkeypatch):
    out = tmp_path / "out"
    index = prepared(monkeypatch, public, out)
    assert list(index) == COLUMNS and not violations(index)
    counts = index.groupby(["source", "label"]).size().to_dict()
    assert counts == {
        ("kermany", "Bacterial pneumonia"): 80,
        ("kermany", "Viral pneumonia"): 40,
        ("kermany", "Normal"): 120,
        ("shenzhen", "Normal"): 15,
        ("shenzhen", "Tuberculosis"): 15,
        ("montgomery", "Normal"): 15,
        ("montgomery", "Tuberculosis"): 15,
        ("ieee8023", "COVID-19"): 3,
        ("ieee8023", "Bacterial pneumonia"): 1,
        ("ieee8023", "Viral pneumonia"): 1,
        ("ieee8023", "Pneumonia (unspecified)"): 1,
    }
    other = (index.source == "ieee8023") & (index.label != "COVID-19")
    assert (index.split == "external").equals(other)
    assert index[index.source == "ieee8023"].patient.nunique() == 5
    assert index["mask"][index.source == "shenzhen"].ne("").sum() == 1
    united = index["mask"][index.source == "montgomery"]
    assert all(name.startswith(str(out / "masks")) for name in united)
    columns = np.asarray(Image.open(united.iloc[0]).convert("1")).all(0)
    assert columns.tolist() == [2 <= c < 8 or 12 <= c < 18 for c in range(20)]
    assert not list(out.glob("*.part"))


def test_kermany_patients_join_kinds_but_not_train_and_test(tmp_path):
    root = tmp_path / "chest_xray"
    touch(root / "train/PNEUMONIA/person1_bacteria_1.jpeg")
    touch(root / "train/PNEUMONIA/person1_virus_6.jpeg")
    touch(root / "test/PNEUMONIA/person1_virus_7.jpeg")
    touch(root / "val/PNEUMONIA/person1946_bacteria_4.jpeg")
    touch(root / "train/NORMAL/IM-0115-0001.jpeg")
    touch(root / "train/NORMAL/NORMAL2-IM-0115-0001.jpeg")
    index = find(tmp_path, tmp_path / "out")
    assert sorted(index.patient) == [
        "kermany-test-person1",
        "kermany-train-IM-0115",
        "kermany-train-NORMAL2-IM-0115",
        "kermany-train-person1",
        "kermany-train-person1",
        "kermany-train-person1946",
    ]


def test_a_set_that_its_archive_holds_twice_counts_once(tmp_path, capsys):
    for folder in ("chest_xray", "chest_xray/chest_xray", "chest_xray/__MACOSX/chest_xray"):
        touch(tmp_path / folder / "train/NORMAL/IM-0115-0001.jpeg")
        touch(tmp_path / folder / "train/NORMAL/._IM-0115-0001.jpeg")
    touch(tmp_path / "chest_xray/train/NORMAL/holiday.jpeg")
    assert len(find(tmp_path, tmp_path / "out")) == 1
    assert "1 files have names that are not known" in capsys.readouterr().out


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))


def clinic(files):
    """A source that tells its label by the folder and its patient by the file name, with one mask for each lung."""
    for path in files:
        if path.parent.name in ("healthy", "covid"):
            label = "Normal" if path.parent.name == "healthy" else "COVID-19"
            sides = tuple(path.with_name("masks") / f"{side}-{path.name}" for side in ("left", "right"))
            yield Film((path.stem,), path, label, path.stem, masks=sides if sides[0].is_file() else ())


def test_a_source_from_outside_is_one_row(public, tmp_path, monkeypatch, registry, capsys):
    """Found, split, measured and credited beside the others; what it is told by is its row alone."""
    register_source(
        Source("clinic", "Our clinic 2026", "adults", "ours", "whole", "kermany", "{healthy,covid}/*.png", clinic)
    )
    for n in range(20):
        touch(public / f"clinic/{'covid' if n % 2 else 'healthy'}/{n}.png")
    write_mask(public / "clinic/covid/masks/left-1.png", slice(2, 8))
    write_mask(public / "clinic/covid/masks/right-1.png", slice(12, 18))
    index = prepared(monkeypatch, public, tmp_path / "out")
    ours = index[index.source == "clinic"]
    assert not violations(index) and ours.label.value_counts().to_dict() == {"Normal": 10, "COVID-19": 10}
    assert set(ours.patient) == {f"clinic-{n}" for n in range(20)} and set(ours.split) == {"train", "val", "test"}
    assert ours[ours["mask"] != ""].patient.tolist() == ["clinic-1"]
    said = capsys.readouterr().out
    assert "clinic: Our clinic 2026; adults; masks: lung behind heart" in said and "licence: ours." in said
    assert mask_group("clinic") == mask_group("kermany") == "kermany + clinic" and convention_of("clinic") == "whole"
    with pytest.raises(SystemExit, match=r"(?s)chest_xray.*clinic +\{healthy,covid\}"):
        (tmp_path / "empty").mkdir()
        prepared(monkeypatch, tmp_path / "empty", tmp_path / "out2")


def test_a_source_that_contradicts_itself_is_refused(registry):
    for wrong, sentence in (
        ({"name": "kermany"}, "a source 'kermany' already"),
        ({"convention": "half"}, "no convention 'half'"),
        ({"people": "giants"}, "children or adults"),
    ):
        with pytest.raises(ValueError, match=sentence):
            register_source(Source(**{"name": "new", "title": "New", "people": "adults", "licence": "ours"} | wrong))
    with pytest.raises(ValueError, match="no source 'new'; there are: kermany"):
        get_source("new")


def test_masks_of_a_source_are_measured_with_those_that_were_drawn_alike():
    assert mask_group("shenzhen") == mask_group("montgomery") == "shenzhen + montgomery"
    assert mask_group("kermany") == "kermany" and mask_group("not registered") == "not registered"
    assert [convention_of(name) for name in ("kermany", "shenzhen", "nih", "not registered")] == (
        ["whole", "aerated", "", ""]
    )


def test_the_model_card_credits_every_source_of_the_weights(weights):
    card = (weights / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in {name for entry in read_manifest(weights).values() for name in entry["training"]["pictures"]}:
        source = get_source(name)
        assert name in card.casefold() and source.people in card
        assert all(part in card for part in source.licence.split("; ")), name


def test_an_index_may_hold_what_tasks_need_beside_the_label(tmp_path, monkeypatch):
    """Findings are kept; other labels and splits of a pretraining are known; a source without a row is named."""
    write_index(tmp_path, findings=["Mass|Nodule", ""], label="Other finding", split=["pretrain", "train"], patient="1")
    index = prepared(monkeypatch, tmp_path, tmp_path / "out")
    assert list(index) == [*COLUMNS, "findings"] and list(index.findings) == ["Mass|Nodule", ""]
    assert "s: not known to train.sources" in credits(index)


def test_splits_are_8_1_1_with_every_patient_in_one(public, tmp_path):
    index = find(public, tmp_path / "out")
    index["split"] = split(index)
    assert (index.groupby("patient").split.nunique() == 1).all()
    for _, group in index[index.source != "ieee8023"].groupby(["source", "label"]):
        shares = group.split.value_counts(normalize=True)
        assert abs(shares["train"] - 0.8) < 0.08 and shares["val"] > 0.03 and shares["test"] > 0.03


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_files(public, tmp_path):
    index = find(public, tmp_path / "out")
    shuffled = index.sample(frac=1, random_state=0)
    assert split(shuffled).sort_index().equals(split(index))
    assert not split(index, seed=1).equals(split(index))


def test_a_file_more_in_one_class_moves_no_other(public, tmp_path):
    before = find(public, tmp_path / "out")
    before = before.assign(split=split(before)).set_index("image").split
    touch(public / "downloads/chest_xray/train/PNEUMONIA/person900_virus_900.jpeg")
    after = find(public, tmp_path / "out")
    after = after.assign(split=split(after))
    others = after[~((after.source == "kermany") & (after.label == "Viral pneumonia"))].set_index("image").split
    assert others.equals(before[others.index])


def test_external_pictures_take_their_whole_patient_along():
    index = pd.DataFrame({"patient": "a", "source": "s", "label": ["COVID-19", "Normal"], "split": ["", "external"]})
    assert set(split(index)) == {"external"}


def test_nothing_found_names_the_layouts(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match="(?s)chest_xray.*CHNCXR.*MCUCXR.*metadata.csv"):
        prepared(monkeypatch, tmp_path / "data", tmp_path / "out")
    with pytest.raises(SystemExit, match="There is no folder"):
        prepared(monkeypatch, tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def write_index(root, **changed):
    touch(root / "a.png")
    touch(root / "b.png")
    rows = pd.DataFrame({"image": ["a.png", "b.png"], "patient": ["1", "2"], "split": ["train", "test"]})
    rows.assign(mask="", label="Normal", source="s").assign(**changed).to_csv(root / "index.csv", index=False)


def test_a_valid_index_is_copied_with_absolute_paths(tmp_path, monkeypatch):
    write_index(tmp_path, extra="not needed")
    index = prepared(monkeypatch, tmp_path, tmp_path / "out")
    assert list(index) == COLUMNS and list(index.image) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    with pytest.raises(SystemExit, match="choose another folder"):
        prepared(monkeypatch, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"image": ["a.png", "c.png"]}, "There is no image .*c.png"),
        ({"image": "a.png"}, "a.png is listed more than once"),
        ({"mask": ["", "m.png"]}, "There is no mask .*m.png"),
        ({"label": ["Normal", "Cold"]}, "b.png has the label 'Cold'"),
        ({"split": ["train", "holdout"]}, "b.png has the split 'holdout'"),
        ({"patient": "1"}, "The patient 1 is in several splits: test, train"),
        ({"patient": ["1", ""]}, "b.png has no patient"),
    ],
)
def test_each_violation_is_one_sentence(tmp_path, monkeypatch, changed, sentence):
    write_index(tmp_path, **changed)
    with pytest.raises(SystemExit, match=sentence) as error:
        prepared(monkeypatch, tmp_path, tmp_path / "out")
    assert isinstance(error.value.code, str)  # to standard error, with exit status 1
    assert len(error.value.code.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_columns_are_named(tmp_path, monkeypatch):
    (tmp_path / "index.csv").write_text("image,label\n")
    with pytest.raises(SystemExit, match=r"lacks the column\(s\) mask, source, patient, split"):
        prepared(monkeypatch, tmp_path, tmp_path / "out")


def test_the_real_index_is_valid(index):
    assert violations(index) == []
    assert "COVID-19" in composition(index)
