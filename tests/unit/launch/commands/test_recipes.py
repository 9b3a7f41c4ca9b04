"""`auricle recipes`: figures without a published source are shown as none."""

from __future__ import annotations

import pytest

from launch.commands import recipes
from pretrain.config import Config
from pretrain.profiling import recipe_table


@pytest.mark.parametrize("name", ["data2vec_base", "data2vec2_base", "dinosr_base", "best_rq_base"])
def test_an_unpublished_figure_is_shown_as_none(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = recipe_table.PUBLISHED[name]
    assert published.millions is None

    def counted(config: Config) -> recipe_table.Recipe:
        return recipe_table.Recipe(config.name, 1_000_000, 50.0, 1.0, 1, 1.0, published, True)

    monkeypatch.setattr(recipe_table, "recipe_row", counted)
    monkeypatch.setattr("launch.cli.tables.PIPED_WIDTH", 80)
    assert recipes.run([name]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    row, source = (line for line in said.splitlines() if line.startswith(name))
    assert row.split()[1:4] == ["1.0", "(none)", "50"]
    assert row.split()[-1] == "yes"
    assert published.source in " ".join(source.split())
