"""Aligner: durations that are known are found."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.models.synthesis.aligner import Aligner, best_durations, change, forward_sum

N_MELS, WORDS, SILENCE = 20, ("abc", "cad", "bda", "dcb"), 4


def recordings(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Texts of two to four words between silences: tokens, their durations, mel frames, and the lengths of both.

    A letter sounds differently in each word, lasts 3 to 17 frames and is noisy.
    """
    rng = np.random.default_rng(0)
    sound = {(word, letter): 0.5 * rng.standard_normal(N_MELS).cumsum() for word in WORDS for letter in word}
    tokens, durations, mels = [], [], []
    for _ in range(count):
        spoken = [(SILENCE, np.full(N_MELS, -2.0), int(rng.integers(6, 11)))]
        for word in rng.choice(WORDS, size=rng.integers(2, 5)):
            spoken += [("abcd".index(letter), sound[word, letter], int(rng.integers(3, 18))) for letter in word]
            spoken.append((SILENCE, np.full(N_MELS, -2.0), int(rng.integers(6, 11))))
        frames = [mean + 0.3 * rng.standard_normal((length, N_MELS)) for _, mean, length in spoken]
        mels.append(torch.from_numpy(np.concatenate(frames)).float())
        tokens.append(torch.tensor([token for token, _, _ in spoken]))
        durations.append(torch.tensor([length for _, _, length in spoken]))

    def padded(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    lengths = (torch.tensor([len(row) for row in rows]) for rows in (tokens, mels))
    return padded(tokens), padded(durations), padded(mels), *lengths


def test_durations_are_learned_from_texts_alone() -> None:
    tokens_BN, durations_BN, mel_BFD, tokens_B, frames_B = recordings(24)
    torch.manual_seed(0)
    embedding, aligner = nn.Embedding(5, 32), Aligner(32, N_MELS, 64)
    optimizer = torch.optim.Adam([*embedding.parameters(), *aligner.parameters()], lr=1e-2)

    def error() -> float:
        """Mean distance of the ends of tokens from the true ones, in frames."""
        with torch.no_grad():
            log_BFN = aligner(embedding(tokens_BN), mel_BFD, tokens_B, frames_B)
        found_BN = best_durations(log_BFN, tokens_B, frames_B)
        inside_BN = torch.arange(tokens_BN.shape[1]) < tokens_B[:, None]
        return float((found_BN.cumsum(1) - durations_BN.cumsum(1)).abs()[inside_BN].float().mean())

    assert error() > 4
    for _ in range(60):
        log_BFN = aligner(embedding(tokens_BN), mel_BFD, tokens_B, frames_B)
        loss = (forward_sum(log_BFN, tokens_B, frames_B) / frames_B).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 1


def test_change_repeats_the_first_and_the_last_frame_of_each_row() -> None:
    mel_BFD = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 3.0, 0.0, 0.0]])[:, :, None]
    found_BF = change(mel_BFD, torch.tensor([4, 2]))[:, :, 0]
    assert found_BF[0].tolist() == [1.0, 3.0, 6.0, 4.0]
    assert found_BF[1, :2].tolist() == [2.0, 2.0]


def test_a_text_with_more_tokens_than_frames_has_no_path() -> None:
    log_BFN = torch.zeros(2, 3, 4)
    found_B = forward_sum(log_BFN, torch.tensor([4, 2]), torch.tensor([3, 3]))
    torch.testing.assert_close(found_B, torch.tensor([0.0, -np.log(2.0)]).float())
