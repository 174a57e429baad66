"""The sentence that is read first: what all networks say, and how often that is right elsewhere."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from manet_core.pipeline import Analysis, Reading
from manet_core.tasks import get_task
from manet_core.weights import fingerprint
from ui.claims import Claims, claimed, summary

CLASSES = get_task("manet").classes
ENTRIES = {name: {"task": "manet", "file": name, "sha256": 64 * digit} for name, digit in (("a", "1"), ("b", "2"))}


def share(value):
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def found(**claims):
    empty = dict.fromkeys(CLASSES, {})
    groups = {"all": {"n": 950, "accuracy": share(0.7)}, "divided": {"n": 40, "accuracy": share(0.55)}}
    groups["unsure"] = {"n": 30, "accuracy": share(0.6)}
    return {"models": ["a", "b"], "share_unanimous": 0.7, "groups": groups, "claims": empty | claims}


AGREEMENT = {
    "external": found(**{"COVID-19": {"n": 570, "found": share(0.62), "others": 380, "wrongly": share(0.1)}}),
    "test": found(Normal={"n": 380, "found": share(0.5), "others": 9, "wrongly": share(0.8)}),
}
OTHER_FINDINGS = {"n": 55, "models": {"a": {}, "b": {}}, "claimed": {"any": share(0.3), "Normal": share(0.24)}}
LOCALISATION = {
    "n": 71,
    "models": {
        name: {explainer: {"enrichment": share(value)} for explainer, value in found.items()}
        for name, found in {
            "a": {"gradcam": 0.94, "layercam-finer": 1.23, "occlusion": 1.3},
            "b": {"gradcam": 1.01, "layercam-finer": 1.63},
        }.items()
    },
}


@pytest.fixture
def claims(tmp_path):
    weights = {name: fingerprint(entry) for name, entry in ENTRIES.items()}
    evidence = {
        "models": {name: {"sha256": of} for name, of in weights.items()},
        "agreement": {"manet": AGREEMENT},
        "other_findings": {"manet": OTHER_FINDINGS},
        "localisation": LOCALISATION,
        "measured_of": dict.fromkeys(("agreement", "other_findings", "localisation"), weights),
    }
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    return Claims(ENTRIES, tmp_path)


def with_other(folder: Path, change: Callable[[dict], object]) -> Claims:
    """Claims of the same evidence after a change."""
    evidence = json.loads((folder / "evidence.json").read_text())
    change(evidence)
    (folder / "evidence.json").write_text(json.dumps(evidence))
    return Claims(ENTRIES, folder)


def analysis(withheld=(), **said):
    readings = {
        name: Reading({c: float(c == label) for c in CLASSES}, label, {}, {}, {}, (7, 7), {}, "manet")
        for name, label in said.items()
    }
    return Analysis(None, None, readings, list(withheld), withheld=list(withheld))


def test_a_claim_is_told_with_its_evidence_of_other_hospitals(claims, tmp_path):
    html = summary(analysis(a="COVID-19", b="COVID-19"), claims)
    assert "All 2 networks: <b>COVID-19</b>" in html
    assert (
        "On X-rays of other hospitals, this was claimed for 62% (57–67) of those labelled COVID-19 (n = 570) and, "
        "wrongly, for 10% (5–15) of the others (n = 380)."
    ) in html
    assert claims.doubts(analysis(a="COVID-19", b="COVID-19")) == []
    more = {"claimed": 391, "right": share(0.9)}
    claims = with_other(tmp_path, lambda e: e["agreement"]["manet"]["external"]["claims"]["COVID-19"].update(more))
    told = "Of these claims, 90% (85–95) were right (n = 391), where 60% of the X-rays were labelled so."
    assert told in summary(analysis(a="COVID-19", b="COVID-19"), claims)


def test_where_no_other_hospital_tells_that_is_said(claims):
    html = summary(analysis(a="Normal", b="Normal"), claims)
    assert "There are no figures for X-rays of other hospitals." in html
    told = (
        "On test X-rays of the training hospitals, this was claimed for 50% (45–55) of those labelled Normal (n = 380)."
    )
    assert told in html, "nine others are too few to say anything"
    assert "was not measured" in summary(analysis(a="Tuberculosis", b="Tuberculosis"), claims)


def test_a_claim_of_normal_is_told_with_what_it_overlooks(claims, tmp_path):
    told = "Of test X-rays with another finding, such as a nodule or an effusion, 24% (19–29) were called so (n = 55)."
    assert told in summary(analysis(a="Normal", b="Normal"), claims)
    assert "another finding" not in summary(analysis(a="COVID-19", b="COVID-19"), claims)
    assert "another finding" not in summary(analysis(a="Normal"), claims), "it was measured of both"
    claims = with_other(tmp_path, lambda e: e["other_findings"]["manet"].update(n=9))
    assert "another finding" not in summary(analysis(a="Normal", b="Normal"), claims), "too few"


def test_networks_that_disagree_name_no_class(claims):
    apart = analysis(a="COVID-19", b="Normal")
    assert apart.divided_of("manet") and claimed(apart) == "No reliable reading"
    (doubt,) = claims.doubts(apart)
    assert doubt.startswith(
        "The networks disagree (COVID-19 by 1 of 2, Normal by 1 of 2). On X-rays of other hospitals"
    )
    assert doubt.endswith("most of them were right in 55% (50–60) (n = 40).")
    assert summary(apart, claims) == "", "which is told once"
    apart.readings["c"] = Reading({"Pneumonia": 1.0}, "Pneumonia", {}, {}, {}, (7, 7), {}, "guided")
    assert claims.doubts(apart) == [], "the networks of another task agree"
    html = summary(apart, claims)
    assert "<b>No reliable reading</b>" in html and doubt in html and "Predicted: <b>Pneumonia</b>" in html


def test_networks_that_are_not_sure_enough_claim_no_class(claims):
    readings = {
        name: Reading({"Tuberculosis": p, "Normal": 1 - p}, "Tuberculosis", {}, {}, {}, (7, 7), {}, "manet")
        for name, p in (("a", 0.9), ("b", 0.66))
    }
    low = {name: replace(reading, operating_point=0.66) for name, reading in readings.items()}
    high = readings | {"b": replace(readings["b"], operating_point=0.67)}
    sure, unsure = (Analysis(None, None, found, []) for found in (low, high))
    assert sure.claim_of("manet") == ["Tuberculosis"] and not sure.unsure_of("manet") and claims.doubts(sure) == []
    assert unsure.claim_of("manet") is None and unsure.unsure_of("manet") and not unsure.divided_of("manet")
    assert claimed(unsure) == "No reliable reading" and summary(unsure, claims) == ""
    (doubt,) = claims.doubts(unsure)
    assert doubt == (
        "All 2 networks say Tuberculosis, but not surely enough (90%, 66%; a claim needs 0% to 67%). On X-rays of "
        "other hospitals on which they were no surer, they were right in 60% (55–65) (n = 30)."
    )
    alone = Analysis(None, None, {"b": high["b"]}, [])
    assert claims.doubts(alone) == ["The network says Tuberculosis, but not surely enough (66%; a claim needs 67%)."], (
        "there are figures of both networks only"
    )


def test_what_the_picture_says_comes_before_what_networks_say(claims):
    bad = analysis(["Hardly any lung was found."], a="Normal", b="Normal")
    assert claims.doubts(bad) == ["Hardly any lung was found."] and claimed(bad) == "No reliable reading"


@pytest.mark.parametrize("spoil", ["other weights", "older evidence", "one network alone", "no file", "damaged"])
def test_figures_of_other_networks_are_not_told(claims, tmp_path, spoil):
    said, entries = {"a": "COVID-19", "b": "COVID-19"}, dict(ENTRIES)
    if spoil == "other weights":
        entries["a"] = entries["a"] | {"sha256": 64 * "9"}
    elif spoil == "older evidence":
        evidence = json.loads((tmp_path / "evidence.json").read_text())
        evidence["measured_of"]["agreement"]["a"] = 64 * "9"
        (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    elif spoil == "one network alone":
        del said["b"]
    elif spoil == "no file":
        (tmp_path / "evidence.json").unlink()
    elif spoil == "damaged":
        (tmp_path / "evidence.json").write_text('{"models": []}')
    html = summary(analysis(**said), Claims(entries, tmp_path))
    assert "was not measured" in html and "%" not in html
    assert ("Predicted: <b>" in html) == (spoil == "one network alone")


def test_nothing_is_claimed_where_nothing_was_asked(claims):
    assert "No network was asked" in summary(analysis(), claims) and claims.doubts(analysis()) == []


def test_heatmaps_are_told_with_what_lies_on_lesions(claims, tmp_path):
    both = analysis(a="Normal", b="Normal")
    start = "On 71 X-rays with lesions outlined by radiologists, heatmaps of "
    assert claims.on_heatmaps(both) == (
        f"{start}these networks by Grad-CAM put 0.9 to 1.0 times as much on the lesions as chance would, by LayerCAM, "
        "one block earlier 1.2 to 1.6 times."
    )
    alone = replace(analysis(a="Normal"), explainer="occlusion")
    assert claims.on_heatmaps(alone) == (
        f"{start}these networks by Occlusion put 1.3 times as much on the lesions as chance would."
    )
    assert "was not measured" in claims.on_heatmaps(replace(both, explainer="occlusion")), "of one alone it was"
    retrained = Claims(ENTRIES | {"b": ENTRIES["b"] | {"sha256": 64 * "9"}}, tmp_path)
    assert "heatmaps of 1 of these networks by Grad-CAM put 0.9 times" in retrained.on_heatmaps(both)
    assert "was not measured" in retrained.on_heatmaps(analysis(b="Normal"))
    assert "was not measured" in Claims(ENTRIES, tmp_path / "nowhere").on_heatmaps(both)
    assert claims.on_heatmaps(analysis()) == ""


def test_of_joined_sets_each_tells_of_its_own_networks(claims, tmp_path):
    guided, other = tmp_path / "guided", {"g": {"sha256": 64 * "7"}}
    guided.mkdir()
    of, claim = {"g": fingerprint(other["g"])}, {"n": 50, "found": share(0.6)}
    unsure = {"unsure": {"n": 20, "accuracy": share(0.5)}}
    evidence = {
        "localisation": {"n": 51, "models": {"g": {"gradcam": {"enrichment": share(1.2)}}}},
        "agreement": {"guided": {"external": {"models": ["g"], "claims": {"Pneumonia": claim}, "groups": unsure}}},
        "measured_of": dict.fromkeys(("agreement", "localisation"), of),
    }
    (guided / "evidence.json").write_text(json.dumps(evidence))
    joined = Claims(ENTRIES | other, tmp_path, guided)
    both = analysis(a="COVID-19", b="COVID-19")
    both.readings["g"] = Reading({"Pneumonia": 1.0}, "Pneumonia", {}, {}, {}, (7, 7), {}, "guided")
    html = summary(both, joined)
    reading = replace(both.readings["g"], probabilities={"Pneumonia": 0.5}, operating_point=0.6)
    (doubt,) = joined.doubts(replace(both, readings={"g": reading}))
    assert doubt.endswith("on which it was no surer, it was right in 50% (45–55) (n = 20).")
    assert "62% (57–67) of those labelled COVID-19" in html and "60% (55–65) of those labelled Pneumonia" in html
    told = joined.on_heatmaps(both)
    assert "On 71 X-rays" in told and "heatmaps of 2 of these networks by Grad-CAM put 0.9 to 1.0 times" in told
    assert "On 51 X-rays" in told and "put 1.2 times" in told
    assert joined.on_heatmaps(analysis(a="COVID-19", b="COVID-19")) == claims.on_heatmaps(
        analysis(a="COVID-19", b="COVID-19")
    )
