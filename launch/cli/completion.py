"""Completion scripts for bash and zsh: commands, config groups with their choices, and field names.

The names come from the source text of the config classes (parsed, not imported), since importing the plug-ins loads
torch and takes seconds.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from launch.cli.command_table import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[2]
ROOTS = {
    "preprocess": ("launch.config", "PreprocessJob"),
    "targets": ("launch.config", "TargetsJob"),
    "tokens": ("data_pipeline.text.artefact", "TokensConfig"),
    "pretrain": ("launch.config", "PretrainJob"),
    "evaluate": ("launch.config", "EvaluateJob"),
    "finetune": ("launch.config", "FinetuneJob"),
    "transcribe": ("pretrain.recognition.config", "TranscribeConfig"),
    "embed": ("pretrain.retrieval.config", "EmbedConfig"),
    "search": ("pretrain.retrieval.config", "SearchConfig"),
    "device": ("pretrain.federated.config", "DeviceConfig"),
    "speak": ("pretrain.generation.config", "SpeakConfig"),
    "serve": ("launch.serving.config", "ServeConfig"),
    "pipeline": ("launch.workflows.pipeline", "PipelineConfig"),
}
"""Config class of each command with a composed config."""
SAME_FIELDS = {"plan-run": "pretrain", "demo": "pretrain", "bands": "pretrain"}
"""Commands that take the fields of another one."""
PLUGINS = {
    "frontends": "pretrain.models.frontends",
    "encoders": "pretrain.models.encoders",
    "objectives": "pretrain.objectives",
}
"""Kind of plug-in -> package, as in pretrain.registry."""
_CHOICE = re.compile(r"registry\.choice\('(\w+)'\)")


def words(commands: Iterable[str], groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Returns the candidates for the words after each command.

    Args:
        commands: all commands.
        groups: config groups and their choices.
    """
    found: dict[str, list[str]] = {}
    for command in commands:
        root = ROOTS.get(SAME_FIELDS.get(command, command))
        if root is None:
            found[command] = [*SUBCOMMANDS.get(command, ()), "--help"]
            continue
        fields = sorted(set(_fields(*root)))
        own = {field.partition(".")[0] for field in fields}
        choices = [
            f"{'+' if group == 'experiment' else ''}{group}={choice}"
            for group, names in groups.items()
            for choice in names
            if group in own or (group == "experiment" and root == ROOTS["pretrain"])
        ]
        found[command] = [*choices, *(f"{field}=" for field in fields), "--help", "--cfg"]
    return found


def script(shell: str, after: Mapping[str, list[str]]) -> str:
    """Returns the script that defines the completion of `auricle`.

    Args:
        shell: "bash" or "zsh".
        after: candidates by command, see `words`.
    """
    cases = "\n".join(f"    {command}) candidates='{' '.join(listed)}' ;;" for command, listed in after.items())
    template = _BASH if shell == "bash" else _ZSH
    return template.replace("@COMMANDS@", " ".join(after)).replace("@CASES@", cases)


def _fields(module: str, name: str, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of the fields of a config class and of the classes below it."""
    tree, imported = _parsed(module)
    cls = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if cls is None:
        if name in imported:
            yield from _fields(imported[name], name, prefix)
        return
    for base in cls.bases:
        if isinstance(base, ast.Name):
            yield from _fields(module, base.id, prefix)
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from _below(module, ast.unparse(node.annotation), f"{prefix}{node.target.id}")


def _below(module: str, annotation: str, path: str) -> Iterator[str]:
    """Yields the field `path`, or the fields of the config class that its annotation names."""
    choice = _CHOICE.search(annotation)
    if choice and "dict[" not in annotation:
        package = PLUGINS[choice[1]]
        for file in sorted((ROOT / package.replace(".", "/")).glob("[!_]*.py")):
            yield from _fields(f"{package}.{file.stem}", "Config", f"{path}.")
        return
    if annotation == "Launcher":
        for kind in ("LocalConfig", "SlurmConfig", "RayConfig"):
            yield from _fields("launch.config", kind, f"{path}.")
        return
    if "CORPORA" in annotation or ("corpus" in path.rpartition(".")[2] and "PluginChoice" in annotation):
        tree, _ = _parsed("data_pipeline.corpora.config")
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Corpus"):
                yield from _fields("data_pipeline.corpora.config", node.name, f"{path}.")
        return
    holds = re.match(r"(?:Annotated\[)?(\w+)", annotation)
    below = list(_fields(module, holds[1], f"{path}.")) if holds else []
    yield from below or [path]


@functools.cache
def _parsed(module: str) -> tuple[ast.Module, dict[str, str]]:
    """Returns the syntax tree of a module, and the source module of each imported name."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return ast.Module(body=[], type_ignores=[]), {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    ours = ("launch", "pretrain", "data_pipeline")
    return tree, {name: source for name, source in imported.items() if source.partition(".")[0] in ours}


_BASH = r"""# bash completion of auricle; put this line into ~/.bashrc:  eval "$(auricle completion bash)"
_auricle() {
  local current=${COMP_LINE:0:COMP_POINT} candidates typed choices
  current=${current##* }
  if ((COMP_CWORD == 1)); then
    candidates='@COMMANDS@ --help --version'
  else
    case ${COMP_WORDS[1]} in
@CASES@
    *) candidates='@COMMANDS@' ;;
    esac
  fi
  COMPREPLY=()
  if [[ $current == *=* ]]; then # bash splits words at =, so only what follows it is completed
    typed=${current%%=*}=
    choices=$(compgen -W "$candidates" -- "$current")
    if [[ -n $choices && $choices != "$typed" ]]; then
      mapfile -t COMPREPLY <<< "${choices//"$typed"/}"
    else
      compopt -o filenames 2> /dev/null
      mapfile -t COMPREPLY < <(compgen -f -- "${current#*=}")
    fi
    return 0
  fi
  mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$current")
  if ((${#COMPREPLY[@]} == 0)); then
    compopt -o filenames 2> /dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
  elif [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then
    compopt -o nospace 2> /dev/null
  fi
  return 0
}
complete -F _auricle auricle
"""
_ZSH = r"""#compdef auricle
# zsh completion of auricle; put this line into ~/.zshrc after compinit:  eval "$(auricle completion zsh)"
_auricle() {
  local candidates
  local -a choices
  if ((CURRENT == 2)); then
    candidates='@COMMANDS@ --help --version'
  else
    case ${words[2]} in
@CASES@
    *) candidates='@COMMANDS@' ;;
    esac
  fi
  if [[ $PREFIX == *=* ]]; then
    choices=(${(M)${=candidates}:#${PREFIX%%=*}=?*})
    if (($#choices)); then
      compadd -- $choices
    else
      compset -P '*='
      _files
    fi
  else
    compadd -S '' -- ${(M)${=candidates}:#*=}
    compadd -- ${${=candidates}:#*=}
    _files
  fi
}
compdef _auricle auricle
"""
