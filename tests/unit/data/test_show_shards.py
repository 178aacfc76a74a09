"""show_shards and what it draws: every token of the training sequence, as what it is, in reading order."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.build_shards import main as build_main
from data_tools.show_shards import choose, main
from ilvr_ds.contracts import IGNORE_INDEX, ImageRef
from ilvr_ds.data.preview import find_ids, read_preview, token_runs
from ilvr_ds.data.preview_html import write_page
from ilvr_ds.data.preview_sheet import ANSWER, GIVEN, HELPER, INPUT, contact_sheet
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import ShardError

SPANS = [
    {"type": "text", "content": "Ich gehe links. 🐧"},
    {"type": "latent", "helper_image": "b.png"},
    {"type": "latent", "helper_image": "c.png"},
    {"type": "text", "content": "The final answer is: <script>alert(1)</script>"},
]


@pytest.fixture
def folder(write_records, good_record, tokenizer_folder, tmp_path):
    records = [good_record(f"r{i}") for i in range(5)]
    records.append(good_record("spans", sequence_plan=SPANS, text_input="Look <image> and tell."))
    records.append(good_record("<b>odd</b>", image_input=[], text_input="No picture."))
    source = write_records(records)
    options = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--samples-per-shard", 4]
    assert build_main([str(option) for option in (*options, "--workers", 0)]) == 0
    return tmp_path / "out"


@pytest.fixture
def shards(folder):
    return ShardSet.open(folder)


@pytest.fixture
def show(folder, tokenizer_folder, capsys):
    """Run the command; returns its exit code, stdout and stderr."""

    def call(*options):
        capsys.readouterr()
        code = main([str(folder), "--tokenizer", str(tokenizer_folder), *map(str, options)])
        return code, *capsys.readouterr()

    return call


class Page(HTMLParser):
    """Counts tags, keeps the text, and complains about what does not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"img", "meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_runs_are_the_sequence(shards, tokenizer):
    v = tokenizer.vocabulary
    preview = read_preview(shards, 5, tokenizer)
    sample = shards.load_sample(5, tokenizer)
    assert [i for run in preview.tokens for i in run.ids] == sample.input_ids.tolist()
    flags = np.concatenate([[run.supervised] * len(run.ids) for run in preview.tokens])
    assert (flags == (sample.labels != IGNORE_INDEX)).all()
    images = [run for run in preview.tokens if run.kind == "image"]
    assert [run.label for run in images] == ["6 × <|image_pad|>"] and not images[0].supervised  # 60x90 -> 56x84
    latents = [run for run in preview.tokens if run.kind == "latent"]
    assert [run.label for run in latents] == ["8 × <|latent_pad|>"] * 2 and not any(run.supervised for run in latents)
    assert preview.count("latent") == 16 and preview.count("image") == 6
    assert preview.length == len(sample.input_ids)
    assert preview.count(supervised=True) == int((sample.labels != IGNORE_INDEX).sum())
    starts = [run for run in preview.tokens if run.ids == (v.latent_start,)]
    assert [(run.kind, run.supervised) for run in starts] == [("marker", True)] * 2
    assert "🐧" in {run.text.strip() for run in preview.tokens}  # four bytes, four tokens, one character


def test_images_in_reading_order(shards, tokenizer):
    preview = read_preview(shards, 5, tokenizer)
    assert [(image.role, image.picture.size, image.tokens) for image in preview.images] == [
        ("input", (56, 84), 6), ("helper", (56, 56), 4), ("helper", (112, 56), 8),
    ]  # fmt: skip
    assert [part if isinstance(part, str) else part.role for part in preview.prompt] == ["Look ", "input", " and tell."]


@settings(deadline=None, max_examples=30)
@given(parts=st.lists(st.one_of(st.text(max_size=12), st.just(None)), max_size=6), counts=st.integers(1, 9))
def test_any_text_is_cut_without_loss(tokenizer, parts, counts):
    steps = [ImageRef("x") if part is None else part for part in parts]
    ids, labels = tokenizer.encode_sample(["Q", ImageRef("y")], steps, [counts], 3)
    runs = list(token_runs(ids, labels, tokenizer))
    assert [i for run in runs for i in run.ids] == ids.tolist()
    assert [run.supervised for run in runs for _ in run.ids] == (labels != IGNORE_INDEX).tolist()
    assert [len(run.ids) for run in runs if run.kind == "image"] == [counts]
    said = "".join(run.text for run in runs if run.kind == "text" and run.supervised)
    assert "�" in "".join(p for p in parts if p) or "�" not in said


def test_the_page(show, folder, tmp_path):
    code, out, _ = show("--html", tmp_path / "look.html")
    assert code == 0 and "7 samples" in out
    text = (tmp_path / "look.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("article") == 7 and page.tags.count("img") == 2 * 5 + 3 + 1
    assert "script" not in page.tags and "link" not in page.tags and "b" in page.tags
    assert not re.search(r"https?:|url\(", text)  # nothing is fetched
    joined = "".join(page.texts)
    assert "<script>alert(1)</script>" in joined and "<b>odd</b>" in joined  # as text
    assert "8 × <|latent_pad|>" in joined and "6 × <|image_pad|>" in joined
    sources = [value for name, value in page.attributes if name == "src"]
    first = Image.open(io.BytesIO(base64.b64decode(sources[0].partition("base64,")[2])))
    assert first.size == (56, 84)
    assert list(tmp_path.glob("*.tmp")) == []


def test_supervised_tokens_and_only_they_are_marked(shards, tokenizer):
    preview = read_preview(shards, 0, tokenizer)
    page = "".join(write_page([preview], "t", "a", 100))
    marked = re.findall(r'<span class="t s(?: m)?" title="([^"]*)"', page)
    given_tokens = re.findall(r'<span class="t(?: m)?" title="([^"]*)"', page)
    supervised = [run for run in preview.tokens if run.supervised]
    assert len(marked) == len(supervised) and not any("no loss" in title for title in marked)
    assert len(given_tokens) > 10 and all("no loss" in title for title in given_tokens)


def test_large_images_are_small_on_the_page(shards, tokenizer):
    page = "".join(write_page([read_preview(shards, 0, tokenizer)], "t", "a", 28))
    source = re.search(r"base64,([^\"]*)", page).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (19, 28)
    assert "56×84" in page  # the true size


def test_the_sheet(shards, tokenizer, show, tmp_path):
    previews = [read_preview(shards, number, tokenizer) for number in range(len(shards))]
    sheet = contact_sheet(previews, "title", "about")
    colours = {colour for _, colour in sheet.getcolors(2**24)}
    for name in (INPUT, HELPER, ANSWER, GIVEN):
        assert tuple(int(name[i : i + 2], 16) for i in (1, 3, 5)) in colours
    assert sheet.size == contact_sheet(previews, "title", "about").size
    assert contact_sheet(previews[:1], "title", "about").height < sheet.height
    code, out, _ = show("--sheet", tmp_path / "look.png", "--first", 3)
    assert code == 0 and "3 samples" in out
    assert Image.open(tmp_path / "look.png").size[0] == sheet.width


def test_ribbon_is_to_scale(shards, tokenizer):
    preview = read_preview(shards, 5, tokenizer)
    sheet = np.asarray(contact_sheet([preview], "t", "a"))
    is_colour = {
        name: (sheet == [int(name[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2)
        for name in (INPUT, HELPER, ANSWER, GIVEN)
    }
    bar = int(sum(is_colour.values()).sum(axis=1).argmax())  # the row with most of these colours
    lengths = {"latent": int(is_colour[HELPER][bar].sum()), "image": int(is_colour[INPUT][bar].sum())}
    width = sheet.shape[1] - 2 * (40 + 22)
    for kind, pixels in lengths.items():
        assert abs(pixels - width * preview.count(kind) / preview.length) < 6


def test_choice(shards, capsys):
    assert choose(shards, None, None, 3, 12) == [0, 1, 2]
    assert choose(shards, None, None, None, 4) == [0, 1, 2, 3]
    assert choose(shards, None, None, 99, 12) == list(range(7))
    drawn = choose(shards, None, 5, None, 3)
    assert drawn == choose(shards, None, 5, None, 3) and len(set(drawn)) == 3
    assert {tuple(choose(shards, None, seed, None, 3)) for seed in range(9)} != {tuple(drawn)}
    assert choose(shards, ["spans", "r0"], None, None, 12) == [5, 0]


def test_ids_are_found_and_missed(shards):
    looked_at = []
    assert find_ids(shards, ["r1"], (looked_at.append(n) or n for n in range(7))) == [1]
    assert looked_at == [0, 1]  # no further
    with pytest.raises(ShardError, match=r"no sample has the id 'nobody'.*rejects.jsonl"):
        find_ids(shards, ["r1", "nobody"], range(7))


def test_errors(show, folder, tokenizer_folder, tmp_path, capsys):
    assert "no sample has the id 'x'" in show("--ids", "x", "--html", tmp_path / "a.html")[2]
    assert "the folder" in show("--html", tmp_path / "none" / "a.html")[2]
    with pytest.raises(SystemExit):
        show()
    assert "nothing to write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        show("--html", "a.html", "--first", 0)
    assert main([str(tmp_path), "--tokenizer", str(tokenizer_folder), "--html", str(tmp_path / "a.html")]) == 1
    assert "manifest.json: no such file" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


def test_another_tokenizer_is_refused(folder, spec, tmp_path, capsys):
    import json

    (tmp_path / "tokenizer.json").write_text(json.dumps(spec(("assistant",))))
    assert main([str(folder), "--tokenizer", str(tmp_path), "--html", str(tmp_path / "a.html")]) == 1
    assert "counted with tokenizer" in capsys.readouterr().err
