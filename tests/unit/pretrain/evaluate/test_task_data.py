"""Tasks as data: layouts of known corpora, labels, splits, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.preprocess.config import CutConfig, PreprocessConfig
from pretrain.evaluate import definitions
from pretrain.evaluate.config import EvaluateConfig, task_names
from pretrain.evaluate.manifest import Listing, Utterance, read_audio, read_listing
from pretrain.evaluate.task_data import divide, inputs, list_task
from pretrain.evaluate.task_inputs import TaskInputs
from pretrain.evaluate.tasks import Task, TaskConfig, open_task
from pretrain.evaluate.verification import all_pairs
from tests.support.corpora import preprocess_here

RNG = np.random.default_rng(0)


def sound(file: Path, seconds: float = 0.1, channels: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    wave = RNG.normal(0, 0.1, (round(seconds * 16_000), channels))
    soundfile.write(file, wave, 16_000, format="FLAC" if file.suffix == ".flac" else "WAV")
    return file


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def librispeech(root: Path) -> None:
    for subset, speaker in (("train-clean-100", 1), ("dev-clean", 2), ("test-clean", 3)):
        folder = root / "LibriSpeech" / subset / f"{speaker}" / "10"
        sound(folder / f"{speaker}-10-0000.flac")
        write(folder / f"{speaker}-10.trans.txt", f"{speaker}-10-0000 HELLO")
        grid = (
            'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.1\n<exists>\n1\n"IntervalTier"\n"phones"\n'
            '0\n0.1\n2\n0\n0.05\n"HH"\n0.05\n0.1\n"AH0"\n'
        )
        write(root / "alignments" / subset / f"{speaker}" / "10" / f"{speaker}-10-0000.TextGrid", grid.strip())


def timit(root: Path) -> None:
    for split, dialect, speaker in (("TRAIN", 1, "FCJF0"), ("TRAIN", 2, "MABC0"), ("TEST", 1, "FAKS0")):
        for sentence in ("SA1", "SX37"):
            file = sound(root / split / f"DR{dialect}" / speaker / f"{sentence}.WAV")
            write(file.with_suffix(".PHN"), "0 400 h#", "400 900 sh", "900 1000 q", "1000 1600 ax-h")


def speech_commands(root: Path) -> None:
    for word in ("yes", "bed", "_background_noise_"):
        for speaker in ("00a1", "00b2", "00c3"):
            sound(root / word / f"{speaker}_nohash_0.wav")
    write(root / "validation_list.txt", "yes/00b2_nohash_0.wav", "bed/00b2_nohash_0.wav")
    write(root / "testing_list.txt", "yes/00c3_nohash_0.wav", "bed/00c3_nohash_0.wav")


def voxceleb(root: Path) -> None:
    for speaker in ("id10001", "id10002", "id10003", "id10004"):
        for take in ("00001", "00002"):
            sound(root / speaker / "abc" / f"{take}.wav")
    one, other = "id10001/abc/00001.wav", "id10002/abc/00001.wav"
    write(
        root / "veri_test.txt", f"1 {one} id10001/abc/00002.wav", f"0 {one} {other}", f"0 {one} id99999/abc/00001.wav"
    )


def common_voice(root: Path) -> None:
    for locale in ("de", "fr"):
        for split in ("train", "dev", "test"):
            sound(root / locale / "clips" / f"{locale}_{split}.wav")
            row = f"{locale}-{split}\t{locale}_{split}.wav\tbon\t{locale}"
            write(root / locale / f"{split}.tsv", "client_id\tpath\tsentence\tlocale", row)


def intents(root: Path) -> None:
    for split in ("train", "valid", "test"):
        rows = []
        for action in ("activate", "decrease"):
            sound(root / "wavs" / "speakers" / split / f"{action}.wav")
            rows.append(f"0,wavs/speakers/{split}/{action}.wav,{split},turn it on,{action},lights,none")
        write(root / "data" / f"{split}_data.csv", ",path,speakerId,transcription,action,object,location", *rows)


def emotion(root: Path) -> None:
    for session, label in ((1, "neu"), (1, "hap"), (2, "exc"), (3, "sad"), (3, "fru")):
        name = f"Ses0{session}F_impro01_{'F' if label not in ('fru', 'hap') else 'M'}000"
        sound(root / f"Session{session}" / "sentences" / "wav" / f"Ses0{session}F_impro01" / f"{name}.wav")
        file = root / f"Session{session}" / "dialog" / "EmoEvaluation" / f"{name[:-5]}_{label}.txt"
        write(file, "% header", f"[6.29 - 8.23]\t{name}\t{label}\t[2.5, 2.5, 2.5]", "C-E2:\tNeutral;\t()")


LAYOUTS: dict[str, tuple[Callable[[Path], None], list[str], list[set[str]]]] = {
    "librispeech_phones": (librispeech, ["AH", "HH"], [{"1"}, {"2"}, {"3"}]),
    "timit": (timit, ["ah", "sh", "sil"], [{"MABC0"}, {"FCJF0"}, {"FAKS0"}]),
    "speech_commands": (speech_commands, ["bed", "yes"], [{"00a1"}, {"00b2"}, {"00c3"}]),
    "superb_keywords": (speech_commands, ["unknown", "yes"], [{"00a1"}, {"00b2"}, {"00c3"}]),
    "voxceleb": (
        voxceleb,
        ["id10001", "id10002", "id10003", "id10004"],
        [set(), {"id10003", "id10004"}, {"id10001", "id10002"}],
    ),
    "common_voice_languages": (
        common_voice,
        ["de", "fr"],
        [{"de-train", "fr-train"}, {"de-dev", "fr-dev"}, {"de-test", "fr-test"}],
    ),
    "superb_intents": (intents, ["activate_lights_none", "decrease_lights_none"], [{"train"}, {"valid"}, {"test"}]),
    "superb_emotion": (emotion, ["happy", "neutral", "sad"], [{"Ses03"}, {"Ses02"}, {"Ses01"}]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts_give_classes_and_splits(name: str, tmp_path: Path) -> None:
    if name == "librispeech_phones":
        pytest.importorskip("praatio")
    make, classes, speakers = LAYOUTS[name]
    make(tmp_path)
    said: list[str] = []
    task = TaskInputs(EvaluateConfig(checkpoint="x", data={name: str(tmp_path)}), name, said.append)
    used = {task.label[u.name] for part in task.parts for u in part} if task.kind == "pairs" else set(task.classes)
    assert used <= set(classes)
    assert task.kind == "pairs" or sorted(task.classes) == classes
    found = [{u.speaker for u in part} for part in task.parts]
    assert found == speakers or (name == "timit" and found[2] == speakers[2] and len(found[0] | found[1]) == 2)
    assert f"{name}: 0.00 h; utterances: " in said[-1] or f"{name}: 0.00 h; utterances: " in said[-2]
    if name == "timit":
        assert all("SA1" not in u.name for part in task.parts for u in part)
        assert [i.phone for i in task.phones["TEST/DR1/FAKS0/SX37.WAV"]] == ["sil", "sh", "ah"]
    if name == "voxceleb":
        assert task.trials is not None
        assert task.trials.same_P.tolist() == [True, False]
        assert "1 trials name recordings that the data lacks" in said[-1]


def test_every_shipped_task_can_be_read() -> None:
    assert {"phones", "keywords", "digits", "speaker", "language", *LAYOUTS} <= set(definitions.names("task"))
    for name in definitions.names("task"):
        assert open_task(name).config.kind


def test_a_task_is_read_from_shards_with_labels_in_their_json(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        sound(tmp_path / "audio" / f"{number}.wav", 0.3)
        rows.append({"path": f"audio/{number}.wav", "speaker": f"s{number // 2}", "mood": ("glad", "sad")[number % 2]})
    write(tmp_path / "list.jsonl", *map(json.dumps, rows))
    corpus = ManifestCorpus(path=str(tmp_path / "list.jsonl"))
    preprocess_here(PreprocessConfig(out=str(tmp_path / "shards"), corpus=corpus, cut=CutConfig(min_seconds=0.0)))
    write(tmp_path / "mood.yaml", "kind: utterances", "data: shards", "label: [mood]")
    said: list[str] = []
    task = TaskInputs(EvaluateConfig(checkpoint="x"), str(tmp_path / "mood.yaml"), said.append)
    assert task.classes == {"glad": 0, "sad": 1}
    assert sorted({u.speaker for part in task.parts for u in part}) == [f"s{n}" for n in range(6)]
    assert "speakers were divided: 4 train, 1 valid, 1 test" in said[0]
    assert len(task.waves(task.parts[0][0])) == 4_800


def manifest(folder: Path, header: str, *rows: str) -> Path:
    for name in "abcdefg":
        sound(folder / f"{name}.wav")
    write(folder / "list.csv", header, *rows)
    return folder / "list.csv"


def opened(file: Path, task: str = "keywords", **fields: object) -> TaskInputs:
    config = EvaluateConfig(checkpoint="x", manifest=str(file), **fields)  # type: ignore[arg-type]
    return TaskInputs(config, task, lambda line: None)


def test_a_class_column_of_another_name_is_refused_with_the_columns_that_exist(tmp_path: Path) -> None:
    rows = ("a.wav,1,yes,train", "b.wav,2,no,valid", "c.wav,3,yes,test", "d.wav,3,no,test")
    file = manifest(tmp_path, "audio,spk,word,split", *rows)
    with pytest.raises(ConfigError, match=r"no utterance has a value in the column 'label'.*audio, spk, word, split"):
        opened(file)
    write(tmp_path / "own.yaml", "kind: utterances", "data: list.csv", "label: [word]")
    task = opened(file, str(tmp_path / "own.yaml"))
    assert task.classes == {"no": 0, "yes": 1}
    assert [len(part) for part in task.parts] == [1, 1, 2]


def test_one_class_empty_labels_and_no_speakers_are_refused(tmp_path: Path) -> None:
    header = "path,speaker,label,split"
    same = manifest(tmp_path / "one", header, *(f"{n}.wav,{n},yes,{s}" for n, s in zip("abc", TRIPLE, strict=True)))
    with pytest.raises(
        ConfigError, match=r"has 1 class \(yes\), and needs two or more; the columns are: path, speaker"
    ):
        opened(same)
    empty = manifest(tmp_path / "two", header, "a.wav,1,yes,train", "b.wav,2,,valid", "c.wav,3,no,test")
    with pytest.raises(ConfigError, match=r"1 of 3 utterances have an empty label, such as b.wav"):
        opened(empty)
    nobody = manifest(tmp_path / "three", "path,label,split", "a.wav,yes,train", "b.wav,no,valid", "c.wav,no,test")
    with pytest.raises(ConfigError, match="3 of 3 utterances have no speaker"):
        opened(nobody)
    shared = manifest(tmp_path / "four", header, "a.wav,1,yes,train", "b.wav,2,no,valid", "c.wav,2,no,test")
    with pytest.raises(ValueError, match="in both valid and test"):
        opened(shared)


TRIPLE = ("train", "valid", "test")


@pytest.mark.parametrize("kind", ["utterances", "ranking", "frames"])
def test_a_test_split_of_one_class_is_refused(kind: str, tmp_path: Path) -> None:
    rows = ("a.wav,1,yes,train", "b.wav,2,no,train", "c.wav,3,no,valid", "d.wav,3,yes,valid", "e.wav,4,no,test")
    manifest(tmp_path, "path,speaker,word,split", *rows)
    write(tmp_path / "times.csv", "path,start,end,label", *(f"{r[:5]},0.0,0.1,{r.split(',')[2]}" for r in rows))
    write(tmp_path / "own.yaml", f"kind: {kind}", "data: list.csv", "label: [word]", "alignment: times.csv")
    where = r"times\.csv" if kind == "frames" else "the column word"
    with pytest.raises(ConfigError, match=rf"split test has one class in {where} \(no\).*give it .* another class"):
        opened(tmp_path / "list.csv", str(tmp_path / "own.yaml"))
    assert opened(tmp_path / "list.csv", str(tmp_path / "own.yaml"), ask="valid").classes == {"no": 0, "yes": 1}


def test_a_list_of_trials_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    voxceleb(tmp_path)
    (tmp_path / "veri_test.txt").unlink()
    config = EvaluateConfig(checkpoint="x", data={"voxceleb": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"trials=.*/veri_test.txt: there is no such file.*leave `trials` empty"):
        TaskInputs(config, "voxceleb", lambda line: None)


def test_the_layer_of_trials_is_chosen_on_a_sample_of_other_speakers(tmp_path: Path) -> None:
    voxceleb(tmp_path)
    recording = sound(tmp_path / "id20000" / "abc" / "00000.wav").read_bytes()
    for number in range(1_200):
        file = tmp_path / f"id2{number // 4:04}" / "abc" / f"{number % 4}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(recording)
    task = TaskInputs(EvaluateConfig(checkpoint="x", data={"voxceleb": str(tmp_path)}), "voxceleb", lambda line: None)
    _, others, used = task.parts
    assert {u.speaker for u in used} == {"id10001", "id10002"}
    assert not {u.speaker for u in others} & {u.speaker for u in used}
    assert len(others) == pytest.approx(200, abs=10)
    assert all_pairs(others).same_P.sum() >= 200


def test_unusable_rows_and_recordings_are_counted_and_named(tmp_path: Path) -> None:
    rows = [
        f"{name}.wav,{name},{label},{split}"
        for name, label, split in zip("abcd", "xyxy", (*TRIPLE, "train"), strict=True)
    ]
    file = manifest(
        tmp_path, "path,speaker,label,split", *rows, "f.wav,c,y,test", "gone.wav,g,x,train", "e.wav,e,y,train"
    )
    (tmp_path / "e.wav").write_bytes(b"RIFF no audio")
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", manifest=str(file))
    task = TaskInputs(config, "keywords", said.append)
    assert [u.name for u in task.parts[0]] == ["a.wav", "d.wav"]
    assert any(line.startswith("keywords: rejected") and "gone.wav: vanished" in line for line in said)
    assert any(line.startswith("keywords: rejected e.wav") for line in said)
    assert "1 rows rejected (vanished 1); 1 recordings cannot be used" in " ".join(said)


def test_the_label_set_of_an_evaluation_says_which_symbols_are_silence(tmp_path: Path) -> None:
    rows = [f"{name}.wav,{name},{split}" for name, split in zip("abc", TRIPLE, strict=True)]
    file = manifest(tmp_path, "path,speaker,split", *rows)
    spoken = [f"{name}.wav\t{at}" for name in "abc" for at in ("0\t0.05\th#", "0.05\t0.1\taa")]
    write(tmp_path / "phones.tsv", "path\tstart_s\tend_s\tphone", *spoken)
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", manifest=str(file), phones="phones.tsv")
    assert TaskInputs(config, "phones", said.append).silent == []
    assert "warning: none of these classes is silence in label_set=arpabet" in said[-1]
    said.clear()
    task = TaskInputs(dataclasses.replace(config, label_set="timit_61"), "phones", said.append)
    assert task.silent == [task.classes["h#"]]
    assert "warning" not in " ".join(said)


def test_parts_and_channels_of_recordings_are_read_as_preprocess_reads_them(tmp_path: Path) -> None:
    sound(tmp_path / "two.wav", 1.0, channels=2)
    whole, _ = soundfile.read(tmp_path / "two.wav", dtype="float32")
    lines = ["path\tspeaker\tbegin\tend\tchannel", "two.wav\ta\t0.25\t0.5\t0", "two.wav\tb\t0.5\t0.75\t1"]
    write(tmp_path / "list.tsv", *lines)
    listing = read_listing(tmp_path / "list.tsv")
    assert [u.speaker for u in listing.utterances] == ["a", "b"]
    for number, utterance in enumerate(listing.utterances):
        expected = whole[4_000 * (number + 1) : 4_000 * (number + 2), number]
        assert np.array_equal(read_audio(utterance), expected)
    assert len({u.name for u in listing.utterances}) == 2


@pytest.mark.parametrize("given", [("train",), ("train", "test"), ()])
def test_missing_splits_are_made_of_whole_speakers_and_do_not_depend_on_order(given: tuple[str, ...]) -> None:
    task = Task("own", TaskConfig(kind="utterances"))
    everyone = [
        Utterance("", f"{speaker}-{take}", f"s{speaker}", split=given[speaker % len(given)] if given else "")
        for speaker in range(10)
        for take in range(3)
    ]
    parts, note = divide(task, everyone)
    speakers = [{u.speaker for u in part} for part in parts]
    assert sum(map(len, parts)) == 30
    assert all(speakers)
    assert sum(map(len, speakers)) == len(set().union(*speakers)) == 10
    assert note
    again, _ = divide(task, everyone[::-1])
    assert [{u.speaker for u in part} for part in again] == speakers
    if len(given) == 2:
        assert {u.split for u in parts[2]} == {"test"}
        assert "1 of 5 speakers of train are for validation" in note


SPOKEN = "path,speaker,label,split"


@pytest.mark.parametrize(
    "names",
    [("Train", "dev", "Test"), ("training", "Validation", "eval"), ("TRAIN", "development", "Evaluation")],
)
def test_usual_names_of_splits_are_those_splits(names: tuple[str, str, str], tmp_path: Path) -> None:
    rows = [f"{name}.wav,{name},{name},{split}" for name, split in zip("abcd", (*names, names[2]), strict=True)]
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", manifest=str(manifest(tmp_path, SPOKEN, *rows)))
    task = TaskInputs(config, "keywords", said.append)
    assert [[u.name for u in part] for part in task.parts] == [["a.wav"], ["b.wav"], ["c.wav", "d.wav"]]
    assert "divided" not in said[0]
    assert "not used" not in said[0]


def test_other_splits_are_counted_in_the_start_line(tmp_path: Path) -> None:
    splits = ("train", "dev", "test", "test", "pretrain", "held-out", "")
    rows = [f"{name}.wav,{name},{name},{split}" for name, split in zip("abcdefg", splits, strict=True)]
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", manifest=str(manifest(tmp_path, SPOKEN, *rows)))
    task = TaskInputs(config, "keywords", said.append)
    assert [len(part) for part in task.parts] == [1, 1, 2]
    assert "3 utterances of other splits are not used: pretrain 1, held-out 1, (none) 1" in said[0]


def test_recordings_for_pretraining_are_in_no_split_where_speakers_are_divided() -> None:
    task = Task("own", TaskConfig(kind="utterances"))
    everyone = [Utterance("", f"{n}", f"s{n}", split=("train", "fold2", "pretrain")[n % 3]) for n in range(12)]
    parts, note = divide(task, everyone)
    assert {u.split for part in parts for u in part} == {"train", "fold2"}
    assert "splits of the data, which lack train or test: train 4, fold2 4" in note
    assert "4 utterances of other splits are not used: pretrain 4" in note


def test_a_task_names_the_values_of_its_splits() -> None:
    named = {"train": ("train",), "valid": ("dev-clean",), "test": ("dev", "pretrain")}
    task = Task("own", TaskConfig(kind="utterances", splits=named))
    values = ("train", "dev-clean", "dev", "pretrain", "validation", "training")
    parts, note = divide(task, [Utterance("", value, value, split=value) for value in values])
    assert [[u.name for u in part] for part in parts] == [["train"], ["dev-clean"], ["dev", "pretrain"]]
    assert note.endswith("not used: validation 1, training 1")


def test_two_speakers_are_too_few_to_divide() -> None:
    few = [Utterance("", f"{n}", f"s{n % 2}") for n in range(6)]
    with pytest.raises(ConfigError, match="give data of three or more speakers"):
        divide(Task("own", TaskConfig(kind="utterances")), few)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: utterance", "own.yaml: kind"),
        ("kind: utterances\nlabels: [x]", "labels"),
        ("kind: utterances\npattern: '('", "is not a regular expression"),
        ("kind: utterances\nsplits: {dev: [dev]}", "must be train, valid or test"),
        ("- kind", "must have fields"),
        ("kind: [", "is not YAML"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_a_wrong_definition_names_the_file_and_the_field(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_task(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("header", "values", "kind"),
    [("path,speaker,label,split", "yes,no,yes,no", "utterances"), ("audio,spk,Transcript,subset", "a,b,c,d", "text"),
     ("path,speaker,phones,split", "a.phn,b.phn,c.phn,d.phn", "frames")],
)  # fmt: skip
def test_a_manifest_is_a_task_by_its_column_of_labels(header: str, values: str, kind: str, tmp_path: Path) -> None:
    rows = [f"{n}.wav,{n},{v},{s}" for n, v, s in zip("abcd", values.split(","), (*TRIPLE, "test"), strict=True)]
    file = manifest(tmp_path, header, *rows)
    for name in "abcd":
        write(tmp_path / f"{name}.phn", "0 800 h#", "800 1600 aa")
    config = EvaluateConfig(checkpoint="x", task=str(file))
    assert task_names(config) == [str(file)]
    assert inputs(config) == {"list": str(file)}
    task = TaskInputs(config, str(file), lambda line: None)
    assert (task.name, task.kind) == ("list", kind)
    assert [len(part) for part in task.parts] == [1, 1, 2]
    assert kind != "frames" or task.silent == [task.classes["h#"]]


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [("path,speaker,label,text", "a.wav,1,yes,yes", "has label, text; its columns are: path, speaker, label, text"),
     ("path,speaker,mood", "a.wav,1,glad", "has none; its columns are: path, speaker, mood; write a YAML file")],
)  # fmt: skip
def test_a_manifest_with_several_kinds_of_labels_or_none_is_refused(
    header: str, row: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_task(str(manifest(tmp_path, header, row)))


def test_a_folder_of_classes_is_a_task(tmp_path: Path) -> None:
    for label in ("glad", "sad"):
        for take in range(5):
            sound(tmp_path / "moods.v2" / label / f"{take}.wav")
    said: list[str] = []
    config = EvaluateConfig(checkpoint="x", task=f"{tmp_path / 'moods.v2'}/")
    task = TaskInputs(config, *task_names(config), said.append)
    assert task.name == "moods.v2"
    assert task.classes == {"glad": 0, "sad": 1}
    assert [len(part) for part in task.parts] == [6, 2, 2]
    assert "speakers are not known" in task.task.config.caveat
    for split in ("train", "test"):
        sound(tmp_path / "divided" / split / "glad" / "1.wav")
    with pytest.raises(ConfigError, match="needs a folder of recordings per class, and has the folders test, train"):
        open_task(str(tmp_path / "divided"))
    with pytest.raises(ConfigError, match="there is no such file"):
        open_task(str(tmp_path / "gone.csv"))


def test_listings_of_folders_name_the_columns_of_their_pattern(tmp_path: Path) -> None:
    speech_commands(tmp_path)
    listing, root = list_task(open_task("speech_commands"), str(tmp_path))
    assert isinstance(listing, Listing)
    assert root == tmp_path
    assert {"label", "speaker", "split"} <= set(listing.columns)
