"""The records are found where they lie."""

import io

import pytest

from mamba_tutorial import records


def test_records_lie_beside_the_notebook_or_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(b'{"results": []}')

    monkeypatch.setattr(records.urllib.request, "urlopen", answer)
    assert records.recorded("speed") == {"results": []}
    assert asked == [f"{records.RECORDS}/speed.json"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.json").write_text('{"results": [1]}')
    assert records.recorded("speed") == {"results": [1]}


def test_a_missing_record_says_how_to_make_it(tmp_path, monkeypatch):
    def refuse(address, timeout):
        raise records.urllib.error.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records.urllib.request, "urlopen", refuse)
    with pytest.raises(FileNotFoundError, match="make bench or an experiment writes it"):
        records.recorded("speed")
