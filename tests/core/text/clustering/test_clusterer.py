"""From texts to clusters: scikit-learn's tf-idf and SVD as the oracle, files, growing texts, texts that say nothing."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import string
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reporters import Recorder
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from expertctl import UserError
from expertctl.core.text.clustering.clusterer import Clusterer, ClustererSettings, fit_clusterer

MODULES = (textwrap, random, statistics, string)


def corpus() -> list[str]:
    texts = []
    for module in MODULES:
        lines = inspect.getsource(module).splitlines()
        texts += ["\n".join(lines[begin : begin + 12]) for begin in range(0, len(lines), 12)]
    return texts


def assigned(clusterer: Clusterer, texts: Sequence[str]) -> list[int]:
    clusters: list[int] = clusterer.distances(clusterer.points(texts)).argmin(axis=1).tolist()
    return clusters


@pytest.fixture(scope="module")
def clusterer() -> Clusterer:
    return fit_clusterer(corpus(), ClustererSettings(clusters=4, width=20))


def test_points_are_those_of_scikit_learn() -> None:
    settings = ClustererSettings(clusters=3, width=15, stop_words=None, words=10_000)
    texts = [text for text in corpus() if not any(letter.isdigit() for letter in text)]  # numbers are folded here
    ours = fit_clusterer(texts, settings)
    tfidf = TfidfVectorizer(min_df=2)
    weighted = tfidf.fit_transform(texts)
    assert sorted(ours.spellings) == sorted(tfidf.get_feature_names_out())
    svd = TruncatedSVD(n_components=15, random_state=0).fit(weighted)
    theirs = normalize(svd.transform(weighted))
    # the order of words differs, so that directions may; angles between texts do not
    np.testing.assert_allclose(ours.points(texts) @ ours.points(texts).T, theirs @ theirs.T, atol=0.02)


def test_the_fit_is_balanced(clusterer: Clusterer) -> None:
    sizes = np.bincount(assigned(clusterer, corpus()), minlength=4)
    assert sizes.sum() == len(corpus())
    assert (sizes > 0).all()


def test_texts_that_grow_need_their_new_words_only(clusterer: Clusterer) -> None:
    first, second = "the median of a sample", " and the variance of random numbers"
    whole = clusterer.sums([first + second])
    np.testing.assert_allclose(clusterer.sums([first]) + clusterer.sums([second]), whole, rtol=1e-5)


def test_it_is_read_as_it_was_written_without_pickles(clusterer: Clusterer, tmp_path: Path) -> None:
    clusterer.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusterer.json", "clusterer.safetensors"]
    again = Clusterer.read(tmp_path)
    assert again.settings == clusterer.settings
    assert assigned(again, corpus()) == assigned(clusterer, corpus())
    assert again.top_words(0) == clusterer.top_words(0)


def test_top_words_say_what_a_cluster_is_about(clusterer: Clusterer) -> None:
    texts = [inspect.getsource(statistics)]
    (cluster,) = assigned(clusterer, texts)
    assert {"data", "statistics", "mean", "value", "values", "float"} & set(clusterer.top_words(cluster, 20))


@pytest.mark.parametrize("text", ["", "   ", "zzzzqqq", "1 2 3"])
def test_a_text_of_which_no_word_is_known_goes_somewhere(clusterer: Clusterer, text: str) -> None:
    assert np.array_equal(clusterer.points([text]), np.zeros((1, 20)))
    assert assigned(clusterer, [text])[0] in range(4)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["", "", ""],
        ["alone", "words", "here"],
        ["the same text", "the same text"],
        ["only one text here"],
    ],
)
def test_too_few_texts_for_the_clusters_are_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="4 clusters need at least 4 texts that share words"):
        fit_clusterer(texts, ClustererSettings(clusters=4))


def test_duplicates_alone_are_divided_all_the_same() -> None:
    clusterer = fit_clusterer(["the same words again"] * 20, ClustererSettings(clusters=3))
    assert np.isfinite(clusterer.centres).all()


def test_chinese_is_taken_by_its_characters() -> None:
    lines = ["床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉", "明月光", "地上霜"]
    recorder = Recorder()
    clusterer = fit_clusterer(lines, ClustererSettings(clusters=2), recorder)
    assert clusterer.settings.analyser == "characters"
    assert "明月" in clusterer.spellings
    assert recorder.lines[0] == "clustering by letter bigrams and trigrams"


def test_unknown_stop_words_are_refused() -> None:
    with pytest.raises(UserError, match="stop word file 'klingon' does not exist"):
        fit_clusterer(corpus(), ClustererSettings(clusters=2, stop_words="klingon"))


def test_settings_are_json(clusterer: Clusterer, tmp_path: Path) -> None:
    clusterer.write(tmp_path)
    content = json.loads((tmp_path / "clusterer.json").read_text())
    assert content["settings"]["clusters"] == 4
    assert len(content["words"]) == len(clusterer.vocabulary)
