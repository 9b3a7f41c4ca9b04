"""Keeps credentials out of run folders, which are often shared.

The formats of issued keys come from detect-secrets (Apache-2.0), extended by the list below.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib
import os
import re
from typing import Any

from data_pipeline.core.schema import ConfigError

NAME = re.compile(
    r"(token|secret|passw|passphrase|credential|api[_-]?key|private_?key|access_?key|account_?key|storage_?key|auth_?key"
    r"|connection_?string|webhook)",
    re.IGNORECASE,
)
"""Names of fields and variables that contain a credential."""
VARIABLE = re.compile(
    rf"{NAME.pattern}|(^|_)(pwd|pass|pat|sas|dsn|auth|jwt|otp|creds?)($|_)|_key$|database_url|redis_url|mongo\w*_ur[il]",
    re.IGNORECASE,
)
"""The same for environment variables, whose values are searched in other texts: MYSQL_PWD, AZURE_STORAGE_SAS …"""
HARMLESS = frozenset({"PWD", "OLDPWD", "XAUTHORITY", "SSH_AUTH_SOCK"})
ADDRESS = re.compile(
    r"://[^/\s@:]*:(?!\d{1,5}(?:[/?#\s]|$))[^\n@'\"]{1,128}@|://(?!localhost:)[\w%+-]+:\d{1,5}[/?#][^\s@]*@[\w.-]+[:/]"
    r"|://(?=[^\s/@:]*\d)[^\s/@:]{16,}@"
    r"|[?&;][\w-]*(token|secret|passw|credential|sig|key)[\w-]*=[^&\s]",
    re.IGNORECASE,
)
"""A password or a token before the host, possibly with a slash or a space, or a signature after the path. `name:80/x@y`
is a password that contains a slash unless `name` is a host, with a dot."""
KEY = re.compile(
    r"\b((AKIA|ASIA)[0-9A-Z]{16}|hf_\w{30,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|gl(pat|rt|dt)-[\w-]{16,}|sk-[\w-]{30,}"
    r"|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]+|Bearer\s+[\w.~+/-]{16,}"
    r"|[srp]k_(live|test)_\w{10,}|whsec_\w{16,}|npm_\w{30,}|pypi-[\w-]{16,}|hv[sbr]\.[\w-]{20,}|dckr_pat_[\w-]{16,}"
    r"|do[opr]_v1_\w{30,}|shp(at|ca|pa|ss)_\w{16,}|SG\.[\w-]{16,}\.[\w-]{16,}|figd_[\w-]{20,}|lin_api_\w{20,}"
    r"|xkeysib-\w{20,}|PMAK-\w{20,}|r8_\w{30,}|nvapi-[\w-]{30,}|gsk_\w{30,}"
    r"|xapp-[\w-]{20,}|dapi[0-9a-f]{32}|gl(sa|c)_\w{20,}|tskey-\w+-[\w-]{10,}|\w{14}\.atlasv1\.[\w-]{20,}|NRAK-[A-Z0-9]{20,}"
    r"|sbp_[0-9a-f]{30,}|dp\.(pt|st|ct|sa|scim|audit)\.[\w.-]{20,}|fo1_[\w-]{20,}|pscale_(pw|tkn|oauth)_[\w.-]{20,}"
    r"|pat\w{14}\.[0-9a-f]{30,}|ntn_\w{30,}|secret_\w{40,}|xai-\w{30,}|pplx-\w{30,}|GOCSPX-[\w-]{20,}|dckr_oat_[\w-]{16,}"
    r"|HRKU-[\w-]{20,}|EAA[A-Za-z0-9]{20,}|wandb_v1_\w{20,}|api_org_\w{30,}|ATATT3[\w-]{20,}|AGE-SECRET-KEY-1[A-Z0-9]{50,}"
    r"|sntry[su]_[\w=+/-]{20,}|ph[cx]_\w{30,}|lsv2_(pt|sk)_\w{20,}|tvly-\w{20,}|rubygems_[0-9a-f]{30,}|ops_eyJ\w{20,}"
    r"|LTAI\w{16,}|jina_\w{30,}|s\.(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{24}\b)"
    r"|\b1//0[\w-]{30,}"
)
"""Formats of issued keys: Amazon, Hugging Face, GitHub, GitLab, OpenAI, Slack, Google, JWT,
Stripe, npm, PyPI, Vault, Docker, DigitalOcean, Shopify, SendGrid, Figma, Linear, Brevo, Postman, Replicate, NVIDIA,
Databricks, Grafana, Tailscale, HCP Terraform, New Relic, Supabase, Doppler, Fly, PlanetScale, Airtable, Notion, xAI,
Perplexity, Heroku, Facebook, Weights & Biases, Atlassian, age, Sentry, PostHog, LangSmith, Tavily, RubyGems, 1Password,
Alibaba Cloud, Jina."""
PAIR = re.compile(
    r"\b(Account|SharedAccess|Shared|Primary|Secondary)_?(Key|Signature|Secret)\s*=\s*[^\s;'\"]{8,}", re.IGNORECASE
)
"""A key-value pair of a connection string."""
WEBHOOK = re.compile(
    r"hooks\.slack\.com/\w+/\S{8}|discord(app)?\.com/api/webhooks/\S{8}|\.webhook\.office\.com/\S{8}"
    r"|outlook\.office(365)?\.com/webhook/\S{8}|api\.telegram\.org/bot\S{8}|hooks\.zapier\.com/hooks/\S{8}"
    r"|maker\.ifttt\.com/\S*/key/\S{8}|/hooks/[a-z0-9]{26}\b",
    re.IGNORECASE,
)
"""Webhooks, whose address is the credential."""
OPTION = re.compile(
    r"(^|\s)(-u|--user)[\s=]*['\"]?[^\s:'\"]+:[^\s'\"]{3,}|\bsshpass\s+-p\s*\S"
    r"|\b(mysql|mysqldump|mysqladmin|mariadb)\b[^\n|;]*\s-p[^\s-]"
)
"""Passwords as arguments of curl, sshpass and MySQL's commands."""
HEADER = re.compile(
    r"\b(x-[\w-]*(key|token|secret)|(proxy-)?authorization|set-cookie|cookie)\s*:\s*['\"]?(\w+\s+)?[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
"""Headers of HTTP requests."""
PGPASS = re.compile(r"(?<![^\s'\"])(?=[^:]*[a-z*])[\w.*-]+:(\d{2,5}|\*):[\w.*-]+:[\w.*-]+:[^\s'\":/]{3,}(?![^\s'\"])")
"""A line of PostgreSQL's password file: host:port:database:user:password."""
BASIC = re.compile(r"\bBasic\s+([A-Za-z0-9+/]{6,}={0,2})", re.IGNORECASE)
"""User and password in the encoding of HTTP basic authentication."""
DETECTORS = {
    "artifactory": "ArtifactoryDetector",
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "basic_auth": "BasicAuthDetector",
    "cloudant": "CloudantDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
"""Modules and classes of detect_secrets.plugins that recognise a key by its format; those based on entropy are not
used, since they report checksums and paths."""
PWD = re.compile(r"(^|[^a-z])pwd['\"]?\s*[=:]\s*['\"]?[^\s'\"$/~.]", re.IGNORECASE)
"""A password; the working directory, also named pwd, is a path or a variable."""
BEGIN, END = (re.compile(rf"-----{word} [A-Z ]*PRIVATE KEY") for word in ("BEGIN", "END"))
BODY = re.compile(r"[-+ ]?\s*(?=\S*[a-z])(?=\S*[A-Z])[A-Za-z0-9+/]{60,}={0,2}\s*")
"""A line of such a key, which a diff may contain without the first line."""
SHAPES = (ADDRESS, KEY, PWD, PAIR, WEBHOOK, OPTION, HEADER, PGPASS, BEGIN)
SHORTEST = 8
"""Length of the shortest value of a secret variable that is searched in other texts."""


def holds_secret(text: str) -> bool:
    """Returns whether `text` contains an address with a password, an issued key, or the value of a secret variable."""
    if any(shape.search(text) for shape in SHAPES):
        return True
    if any(_is_user_and_password(found[1]) for found in BASIC.finditer(text)):
        return True
    if any(True for detector in _detectors() for _ in detector.analyze_string(text)):
        return True
    return any(value in text for name, value in os.environ.items() if _is_secret(name, value))


@functools.cache
def _detectors() -> list[Any]:
    modules = ((importlib.import_module(f"detect_secrets.plugins.{name}"), kind) for name, kind in DETECTORS.items())
    return [getattr(module, kind)() for module, kind in modules]


def _is_user_and_password(encoded: str) -> bool:
    try:
        return b":" in base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        return False


def _is_secret(name: str, value: str) -> bool:
    """Returns whether an environment variable contains a credential; the path of a credentials file is none."""
    if name in HARMLESS or not VARIABLE.search(name):
        return False
    return len(value) >= SHORTEST and not value.startswith("/")


def is_secret_name(name: str) -> bool:
    """Returns whether an environment variable of this name may contain a credential."""
    return name not in HARMLESS and bool(VARIABLE.search(name))


def without_secrets(lines: list[str]) -> list[str]:
    """Removes the lines (or words) that contain or name a credential or belong to a private key."""
    kept, inside = [], False
    for line in lines:
        inside = not line.startswith(("@@", "diff ")) and (inside or bool(BEGIN.search(line)))
        if not (inside or BODY.fullmatch(line) or NAME.search(line) or holds_secret(line)):
            kept.append(line)
        inside = inside and not END.search(line)
    return kept


def refuse_secrets(values: Any, path: str = "") -> None:
    """Raises ConfigError naming a field that contains a credential, since configs are saved in run folders."""
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_secrets(value, f"{path}.{name}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(value, path)
    elif isinstance(values, str) and holds_secret(values):
        raise ConfigError(
            f"{path}: holds an address with a password or a key, which would be written to the run folder; give "
            "credentials in the environment (AWS_ACCESS_KEY_ID …) or in the storage's own config file"
        )
