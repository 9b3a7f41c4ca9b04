"""The run folder documents the run and contains no secrets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, load
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.runs import metadata, redaction
from launch.runs.job_record import write_record
from pretrain.config import Config
from tests.support.checkpoint_states import write_state


def job(runs: Path, *overrides: str) -> PretrainJob:
    values = compose("pretrain", ["+experiment=best_rq_tiny", "data.shards=shards", f"runs={runs}", *overrides])
    return load(PretrainJob, values)


def test_the_folder_describes_the_run(tmp_path: Path) -> None:
    wanted = job(tmp_path, "name=mine", "launcher.processes=2")
    folder = metadata.prepare(wanted)
    assert folder == tmp_path / "mine"
    stored = load(Config, json.loads((folder / "config.json").read_text()))
    assert stored == metadata.run_config(wanted)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["launcher"]["processes"] == 2
    assert environment["packages"]["torch"]
    assert "n_codes: 1024" in (folder / "config.yaml").read_text()


def test_no_secret_is_written_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "NCCL_TOKEN", "HF_TOKEN", "SLURM_JOB_PASSWORD"):
        monkeypatch.setenv(name, "hunter2-and-more")
    monkeypatch.setattr(
        "sys.argv", ["auricle", "pretrain", "api_key=hunter2", "x=hunter2-and-more", "s3://a:hunter2@b"]
    )
    diff = "+ password = 'hunter2'\n+ harmless = 1\n+ root = 'https://me:hunter2@host/x'\n+ odd = 'hunter2-and-more'"
    monkeypatch.setattr(metadata, "_git", lambda *arguments: diff if arguments[0] == "diff" else "abc\n")
    wanted = job(tmp_path)
    folder = metadata.prepare(wanted)
    write_record(folder, "1:1.0", wanted.launcher)
    assert "harmless" in (folder / "git.diff").read_text()
    for file in folder.rglob("*"):
        assert file.is_dir() or "hunter2" not in file.read_text(), file


@pytest.mark.parametrize(
    "value",
    [
        "s3://KEY:hunter2@bucket/shards",
        "https://host/shards?X-Amz-Signature=abc&x=1",
        "https://host/x?sv=2&sig=abc",
        "s3://AKIAABCDEFGHIJKLMNOP/shards",
        "/data/${oc.env:PLANTED_TOKEN}",
    ],
)
@pytest.mark.parametrize("field", ["data.shards", "launcher.image"])
def test_a_config_with_a_secret_is_refused(
    field: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "correct-horse-battery")
    with pytest.raises(ConfigError, match=rf"{field}: .*environment"):
        metadata.prepare(job(tmp_path, "launcher=slurm", f"{field}='{value}'"))
    assert not list(tmp_path.iterdir())


def test_urls_and_paths_without_secrets_are_kept() -> None:
    for harmless in (
        "s3://bucket/shards",
        "http://127.0.0.1:8265",
        "a@b:/c",
        "https://host/x?list=1",
        "/data/tokens/x",
        "+ cd $(pwd); PWD=/work",
        '+ apptainer exec --pwd "$PWD" image',
        "+ " + 64 * "0f",
        "+ the bearer of good news",
    ):
        assert not redaction.holds_secret(harmless)
        assert redaction.NAME.search(harmless) or redaction.without_secrets([harmless]) == [harmless]


@pytest.mark.parametrize(
    "secret",
    [
        "xox" + "b-123456789012-abcdefghij",
        "glpat" + "-abcdefghij0123456789",
        "AI" + "za" + "Sy0123456789_abcdefghijklmnopqrst-u",
        "Authorization: Bearer " + "ey" + "JhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln",
        "Bearer " + "0123456789abcdef0123",
        "pwd=hunter2",
        'db_pwd: "hunter2"',
        "Server=db;Uid=me;Pwd=hunter2;",
        "s3://me:a/b@bucket/x",
        "postgresql://me:p/w:d@db.example/x",
        "mysql://root:hunter2/@db",
        "https://:hunter2@host/x",
        "DefaultEndpointsProtocol=https;AccountName=x;Account" + "Key=" + "Ab1+" * 21 + "ab==;EndpointSuffix=y",
        "Endpoint=sb://x/;SharedAccessKeyName=Root;SharedAccess" + "Key=abcdefgh12345678=",
        "SharedAccess" + "Signature=sv=2022&sr=b&foo=barbarbar",
        "az://container?sv=2022-11-02&sr=b&sig=abc%3D",
        "sk_" + "live_0123456789abcdefghij",
        "rk_" + "live_0123456789abcdefghij",
        "npm" + "_0123456789abcdefghijklmnopqrstuvwxyz",
        "py" + "pi-AgEIcHlwaS5vcmcCJDAwMDAwMDAwLTAwMDA",
        "hv" + "s.CAESIJ0123456789abcdefghijkl",
        "Authorization: Basic " + "bWU6aHVudGVyMg==",
        "curl -u me:hunter2 host",
        "https://hooks." + "slack.com/services/T00000000/B00000000/XXXXXXXXXXXX",
        "https://discord.com/api/" + "webhooks/123456789/abcdefghijklmnop",
        "https://x.webhook." + "office.com/webhookb2/abcdefgh",
        "dckr" + "_pat_0123456789abcdefghij",
        "shp" + "at_0123456789abcdef0123456789abcdef",
        "S" + "G.0123456789abcdefghij.0123456789abcdefghij",
        "A" + "C0123456789abcdef0123456789abcdef",
        "nv" + "api-0123456789abcdefghijklmnopqrstuvwxyz",
        "xa" + "pp-1-A0123456789-0123456789012-0123456789abcdef",
        "da" + "pi" + "0123456789abcdef" * 2,
        "gl" + "sa_0123456789abcdef0123456789abcdef_abcdef01",
        "ts" + "key-auth-k123456CNTRL-0123456789abcdef",
        "AbCdEfGhIjKlMn." + "atlasv1." + "0123456789abcdef" * 4,
        "NR" + "AK-ABCDEFGHIJKLMNOPQRSTUVWXYZ0",
        "sb" + "p_" + "0123456789abcdef" * 2 + "01234567",
        "dp." + "pt." + "0123456789abcdef" * 2,
        "fo" + "1_" + "0123456789abcdef" * 3,
        "pscale" + "_pw_" + "0123456789abcdef" * 3,
        "pat" + "AbCdEfGhIjKlMn." + "0123456789abcdef" * 4,
        "nt" + "n_" + "A1b2C3d4" * 5,
        "xa" + "i-" + "0123456789abcdef" * 5,
        "pp" + "lx-" + "0123456789abcdef" * 3,
        "GOC" + "SPX-abcdefghijklmnopqrstuvwxyz01",
        "1/" + "/0" + "abcdefghij-KLMNOPQRST" * 3,
        "dckr" + "_oat_0123456789abcdef0123456789abcdef",
        "HR" + "KU-AA" + "0123456789abcdef" * 3,
        "EA" + "ACEdEose0cBA" + "0123456789abcdef" * 2,
        "wandb" + "_v1_" + "0123456789abcdef" * 4,
        "api" + "_org_" + "A" * 34,
        "s" + ".AbCdEfGhIjKlMnOpQrStUvWx",
        "AT" + "ATT3xFfGF0" + "0123456789abcdef" * 4,
        "AGE-SECRET-" + "KEY-1" + "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L" * 2,
        "curl -ume:hunter2 host",
        "mysql -u root -phunter2 db",
        "sshpass -p hunter2 ssh host",
        "X-Api-Key: 0123456789abcdef",
        "db.example:5432:db:me:hunter2",
        "https://mattermost.example/" + "hooks/abcdefghijklmnopqrstuvwxyz",
        "postgresql://me:12345/9@host/db",
        "https://me:8080/x@host/y",
        "https://0123456789abcdef0123@host/x",
        "s3://me:hunter 2@bucket",
    ],
)
def test_secrets_are_recognised_by_their_format(secret: str) -> None:
    assert redaction.without_secrets([f"+ x = '{secret}'", "+ y = 1"]) == ["+ y = 1"]
    with pytest.raises(ConfigError, match="shards"):
        redaction.refuse_secrets({"data": {"shards": secret}})


@pytest.mark.parametrize(
    "name",
    [
        *("AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS", "MYSQL_PWD", "PGPASSWORD"),
        *("SENTRY_DSN", "REDISCLI_AUTH", "DATABASE_URL", "GITLAB_PAT", "WANDB_API_KEY", "SLACK_WEBHOOK_URL"),
        *("MYSQL_PASS", "SMTP_PASS", "CI_JOB_JWT"),
    ],
)
def test_values_of_secret_environment_variables_are_redacted_everywhere(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "correct-horse-battery")
    assert redaction.holds_secret("/data/correct-horse-battery/x")
    assert redaction.is_secret_name(name)


@pytest.mark.parametrize(
    "harmless",
    [
        *("http://127.0.0.1:8265/x@y", "ray://head:10001", "runs/basic training", "Basic objects", "s3://bucket/a:b/c"),
        *("npm_config", "pypi-server", "/data/sk_live/x", "data.shards=/x/sigma?list", "0" * 64, "a@b.example:/srv/x"),
        *(
            "http://minio.example:9000/bucket@v1/x",
            "http://localhost:9000/bucket@v1/x",
            "ssh://git@host:22/x",
            "mysql -p",
        ),
        *("images/EAA.png", "x.startswith('s.')", "1//00", "-u user", "python -u train.py a:b", "12:30:00:a:b"),
    ],
)
def test_harmless_text_that_resembles_a_credential_is_kept(harmless: str) -> None:
    assert not redaction.holds_secret(harmless)


def test_a_git_diff_that_is_not_utf8_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diff has a line in Latin-1 and a form feed, which does not end a line."""
    repository = tmp_path / "code"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    (repository / "file").write_bytes(b"one\n")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (repository / "file").write_bytes(b"caf\xe9 \x0c two\xe2\x80\xa8three\n")
    monkeypatch.setattr(metadata, "ROOT", repository)
    folder = metadata.prepare(job(tmp_path))
    assert "+caf\\xe9 \x0c two\u2028three" in (folder / "git.diff").read_text(encoding="utf-8").split("\n")


def test_the_repository_around_an_installed_package_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "x", "--allow-empty"], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(metadata, "ROOT", tmp_path / "site-packages")
    folder = metadata.prepare(job(tmp_path))
    assert json.loads((folder / "environment.json").read_text())["git_sha"] == ""
    assert not (folder / "git.diff").read_text().strip()


def test_no_line_of_a_private_key_is_kept() -> None:
    body = ["b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW", "QyNTUxOQAAACDk"]
    first, last = (f"-----{word} OPENSSH PRIVATE KEY-----" for word in ("BEGIN", "END"))
    key = [f"+{line}" for line in (first, *body, last)]
    around = ["@@ -0,0 +1,4 @@", "+before", "+after", "@@ -9 +9 @@"]
    assert redaction.without_secrets([*around[:2], *key, *around[2:]]) == around
    assert redaction.without_secrets([*key[:2], *around]) == around, "a key without its last line"
    assert redaction.without_secrets([f" {body[0]}", *around]) == around, "a key without its first line"
    with pytest.raises(ConfigError, match="image"):
        redaction.refuse_secrets({"image": "\n".join((first, *body, last))})


def test_a_run_folder_with_checkpoints_of_another_config_is_refused(tmp_path: Path) -> None:
    folder = metadata.prepare(job(tmp_path))
    write_state(folder, 1, config=json.loads((folder / "config.json").read_text()))
    metadata.prepare(job(tmp_path, "train.steps=900", "launcher.processes=2"))
    before = (folder / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        metadata.prepare(job(tmp_path, "optimizer.lr=0.5"))
    assert (folder / "config.json").read_text() == before
