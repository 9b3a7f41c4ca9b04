"""Separation of the utterances in a mixture by masks on its spectrogram, in any order of the estimates (PIT).

A bidirectional LSTM reads the mixture's spectrogram and the encoder's frames. At first it learns masks by
phase-sensitive magnitudes (Erdogan et al. 2015) with permutation-invariant training (Kolbæk et al. 2017, arXiv
1703.06284), beside deep clustering of the bins (chimera++, Wang, Le Roux and Hershey 2018); later, if asked for, by the
signal-to-noise ratio of the waveforms (Luo and Mesgarani 2019, Conv-TasNet, use its scale-invariant form throughout).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.schema import about, config, refuse
from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.interfaces.configs import HeadConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext, valid_frames
from pretrain.interfaces.models import ModelShape, SpeechModel
from pretrain.interfaces.monitoring import INFEASIBLE, HeadMedia, HeadMonitoringRecord
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput, Sum
from pretrain.nn.numerics import full_precision, zero_padding
from pretrain.nn.separation import EPS, Spectra, best_assignment, clustering_loss, negative_snr, si_snr

FLOOR = 1e-2
"""Added to magnitudes of audio of power 1 before the logarithm: 63 dB below white noise of that power."""


@config
class Config(HeadConfig):
    name: Literal["separation"] = "separation"
    sources: Annotated[Literal[2, 3], about("utterances to separate, at least data.sources")] = 2
    window: Annotated[int, about("samples per window of the spectrogram, even", ge=32, le=4096)] = 512
    hop: Annotated[int, about("samples between windows, at most half a window", ge=16)] = 256
    fine_hz: Annotated[
        float,
        about("below it each bin has its own mask; above it, bands of 500 Hz share one", gt=0, le=SAMPLE_RATE / 2),
    ] = 4000.0
    hidden: Annotated[int, about("channels of the LSTM, in each direction", ge=1)] = 256
    recurrent_layers: Annotated[int, about("layers of the LSTM", ge=1, le=8)] = 2
    clustering: Annotated[float, about("weight of deep clustering beside the magnitudes; 0: without", ge=0)] = 0.5
    embedding_dim: Annotated[int, about("channels of the embedding of each bin, for deep clustering", ge=1)] = 20
    waveform_from: Annotated[
        int, about("update from which the loss is the negative SNR of the waveforms; -1: never", ge=-1)
    ] = -1
    unmixed: Annotated[bool, about("whether segments that are not mixed count, with silence as their other parts")] = (
        True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % 2:
            refuse("window", self.window, "must be even")
        if self.hop > self.window // 2:
            refuse(
                "hop", self.hop, f"must be at most half of window={self.window}, or samples are lost between windows"
            )

    @property
    def signed(self) -> bool:
        """Whether its loss may be negative: a signal-to-noise ratio is."""
        return self.waveform_from >= 0

    @property
    def needed_sources(self) -> int:
        """The number of sources."""
        return self.sources


class BandMagnitudes(nn.Module):
    """Joins the bins of a spectrogram above a frequency, where voices have no separate harmonics, to bands of 500 Hz.

    Args:
        window: samples per window.
        fine_hz: each bin below is a band of its own.
    """

    WIDTH_HZ = 500.0

    def __init__(self, window: int, fine_hz: float) -> None:
        super().__init__()
        hz = [number * SAMPLE_RATE / window for number in range(window // 2 + 1)]
        # bins below get negative numbers of their own
        keys = [n - len(hz) if f < fine_hz else int((f - fine_hz) / self.WIDTH_HZ) for n, f in enumerate(hz)]
        bands = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.number = len(bands)
        self.register_buffer("band_of_bin_C", torch.tensor([bands[key] for key in keys]), persistent=False)
        self.band_of_bin_C: Tensor

    def forward(self, spectra: Tensor) -> Tensor:
        """Returns the magnitudes of bands, (…, bands), of complex spectra (…, C)."""
        power = spectra.real.square() + spectra.imag.square()
        joined = power.new_zeros(*power.shape[:-1], self.number)
        return joined.index_add(-1, self.band_of_bin_C, power).sqrt()


class BidirectionalLstm(nn.Module):
    """One layer that reads each row from its first to its last frame and back, (B, K, inputs) to (B, K, 2 · hidden).

    Two LSTMs over padded rows, the second one over rows that are reversed up to their lengths. Packed sequences would
    give the same, but their kernels need the lengths.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(inputs, hidden, batch_first=True)
        self.back = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x_BKH: Tensor, lengths_B: Tensor) -> Tensor:
        """Computes all frames; those beyond `lengths_B`, (B,) on the host, have no meaning and change no other."""
        places_K, last_B1 = torch.arange(x_BKH.shape[1]), lengths_B[:, None] - 1
        mirrored_BK = torch.where(places_K <= last_B1, last_B1 - places_K, places_K)
        onward_BKH, _ = self.onward(x_BKH)
        back_BKH, _ = self.back(_at(x_BKH, mirrored_BK))
        return torch.cat([onward_BKH, _at(back_BKH, mirrored_BK)], dim=2)


def _at(x_BFD: Tensor, places_BK: Tensor) -> Tensor:
    """Returns the frames at these places of each row, (B, K, D); `places_BK` is on the host."""
    rows_B1 = torch.arange(len(x_BFD), device=x_BFD.device)[:, None]
    return x_BFD[rows_B1, places_BK.to(x_BFD.device, non_blocking=True)]


class Separation(Head):
    """Estimates the clean parts of a mixture; a part that is not there should be silent. Targets are parts.

    A row with no part does not count: it was to be mixed, and its micro-batch had no partner for it. A row that was not
    mixed has one part and counts with `unmixed`.
    """

    def __init__(self, config: Config, shape: ModelShape) -> None:
        super().__init__(config)
        self.config = config
        self.spectra = Spectra(config.window, config.hop)
        self.bands = BandMagnitudes(config.window, config.fine_hz)
        bands, width = self.bands.number, 2 * config.hidden
        self.spectrum_in, self.frames_in = nn.Linear(bands, config.hidden), nn.Linear(shape.dim, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        widths = [config.hidden, *[width] * (config.recurrent_layers - 1)]
        self.lstms = nn.ModuleList(BidirectionalLstm(inputs, config.hidden) for inputs in widths)
        self.masks = nn.Linear(width, config.sources * bands)
        self.embed = nn.Linear(width, config.embedding_dim * bands) if config.clustering else None

    def monitoring(self) -> HeadMonitoringRecord:
        return HeadMonitoringRecord(infeasible=INFEASIBLE)

    def prepare(self, model: SpeechModel, batch: Batch, ctx: StepContext) -> HeadPlan:
        rows_B = model.frontend.frame_lengths(batch.lengths_B) > 0
        if batch.sources_BST is None:
            return HeadPlan(torch.zeros((), dtype=torch.float64), torch.zeros_like(rows_B))
        parts_B = batch.sources_BST.any(2).sum(1).cpu()
        rows_B = rows_B & (parts_B >= (1 if self.config.unmixed else 2))
        return HeadPlan(rows_B.sum().double() * self.config.sources, rows_B)

    def forward(self, encoded: EncoderOutput, batch: Batch, plan: HeadPlan, ctx: StepContext) -> LossOutput:
        device, targets_BST = batch.wave_BT.device, self._targets(batch)
        rows_B = plan.rows_B.to(device)
        mixture_BKC, hidden_BKH, masks_BSKC = self._mask(encoded, batch.wave_BT, batch.lengths_B)
        by_waveform = 0 <= self.config.waveform_from <= ctx.step
        with full_precision(device), torch.set_grad_enabled(by_waveform and torch.is_grad_enabled()):
            estimates_BST = self._waves(masks_BSKC, mixture_BKC, batch.wave_BT, batch.lengths_B)
        with full_precision(device):
            if by_waveform:
                mixture_BT = batch.wave_BT.float()[:, None, None]
                costs_BSS = negative_snr(estimates_BST[:, :, None], targets_BST[:, None], mixture_BT)
            else:
                sources_BSKC = self._spectra_of(targets_BST)
                costs_BSS = magnitude_costs(masks_BSKC, mixture_BKC, sources_BSKC)
            best = best_assignment(costs_BSS)
        loss_B = best.cost_B
        if self.embed is not None:
            # one frame where it is unused: every weight needs a gradient in every update
            embedding: Tensor = self.embed(hidden_BKH[:, :1] if by_waveform else hidden_BKH)
            with full_precision(device):
                if by_waveform:
                    loss_B = loss_B + 0.0 * embedding.float().sum()
                else:
                    magnitudes = self.bands(mixture_BKC), self.bands(sources_BSKC)
                    clustered_B = magnitude_clustering(embedding.float(), *magnitudes)
                    loss_B = loss_B + self.config.clustering * clustered_B
        total, count = loss_B.masked_fill(~rows_B, 0.0).sum(), rows_B.sum() * self.config.sources
        arranged_BST = best.arranged(estimates_BST.detach())
        if not self.training:
            self.keep_media(lambda: first_mixture(batch, targets_BST, arranged_BST, rows_B))
        improvement = self._improvement(arranged_BST, targets_BST, batch, rows_B)
        read_B = torch.full_like(rows_B, batch.sources_BST is not None)
        alone_B = read_B & ~targets_BST.flatten(1).any(1)
        metrics = {"si_snr_improvement": improvement, INFEASIBLE: (alone_B.sum(), read_B.sum())}
        return LossOutput(total, count, metrics)

    def separate(self, encoded: EncoderOutput, wave_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns estimates of the parts of mixtures, (B, S, T), in no particular order.

        Args:
            encoded: the encoder's output for the mixtures.
            wave_BT: (B, T) samples at 16 kHz, zero beyond each length.
            lengths_B: valid samples of each row.
        """
        mixture_BKC, _, masks_BSKC = self._mask(encoded, wave_BT, lengths_B)
        with full_precision(wave_BT.device):
            return self._waves(masks_BSKC, mixture_BKC, wave_BT, lengths_B)

    def _mask(self, encoded: EncoderOutput, wave_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mixtures' spectra (B, K, C), the LSTM's output (B, K, H) and masks (B, S, K, C) in [0, 1]."""
        with full_precision(wave_BT.device):
            wave_BT = wave_BT.float()
            spectra_BKC = self.spectra(wave_BT)
            samples_B = lengths_B.to(wave_BT.device, non_blocking=True).clamp(min=1)
            level_B = (wave_BT.square().sum(1) / samples_B).sqrt()
            magnitude_BKC = self.bands(spectra_BKC) / (level_B[:, None, None] + EPS)
        frames = self.frames(encoded)
        # the encoder's frame at the time of each frame of the spectrogram
        n_frames, frames_B = spectra_BKC.shape[1], self.spectra.lengths(lengths_B)
        places_K = (torch.arange(n_frames) * (self.spectra.hop / SAMPLE_RATE * frames.rate_hz)).long()
        places_BK = torch.minimum(places_K[None], (frames.lengths_B[:, None] - 1).clamp(min=0))
        encoded_BKH = _at(self.frames_in(frames.x_BFD), places_BK)
        hidden_BKH = self.norm(self.spectrum_in(torch.log(magnitude_BKC + FLOOR)) + encoded_BKH)
        for lstm in self.lstms:
            hidden_BKH = lstm(hidden_BKH, frames_B)
        masks_BKSC = self.masks(hidden_BKH).float().sigmoid().unflatten(2, (self.config.sources, -1))
        masks_BKSC = masks_BKSC[..., self.bands.band_of_bin_C]
        valid_BK = valid_frames(frames_B, n_frames, wave_BT.device)
        return spectra_BKC, hidden_BKH, masks_BKSC.transpose(1, 2) * valid_BK[:, None, :, None]

    def _waves(self, masks_BSKC: Tensor, mixture_BKC: Tensor, wave_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Returns the masked mixtures as (B, S, T) samples, zero beyond each length."""
        # real products: the gradient of a complex one is conjugated, and the masks are real
        masked_BSKC2 = masks_BSKC[..., None] * torch.view_as_real(mixture_BKC)[:, None]
        estimates_RT = self.spectra.inverse(torch.view_as_complex(masked_BSKC2).flatten(0, 1), wave_BT.shape[1])
        estimates_BST = estimates_RT.reshape(len(wave_BT), self.config.sources, wave_BT.shape[1])
        return zero_padding(estimates_BST.transpose(1, 2), lengths_B).transpose(1, 2)

    def _spectra_of(self, sources_BST: Tensor) -> Tensor:
        """Returns the spectra of all parts, (B, S, K, C)."""
        spectra_RKC: Tensor = self.spectra(sources_BST.flatten(0, 1))
        return spectra_RKC.reshape(*sources_BST.shape[:2], *spectra_RKC.shape[1:])

    def _targets(self, batch: Batch) -> Tensor:
        """Returns the parts of each row, (B, S, T) fp32; parts beyond `data.sources` are silent."""
        wave_BT, found_BST = batch.wave_BT, batch.sources_BST
        if found_BST is None:
            return wave_BT.new_zeros(len(wave_BT), self.config.sources, wave_BT.shape[1], dtype=torch.float32)
        return F.pad(found_BST.float(), (0, 0, 0, self.config.sources - found_BST.shape[1]))

    @torch.no_grad()
    def _improvement(self, estimates_BST: Tensor, targets_BST: Tensor, batch: Batch, rows_B: Tensor) -> Sum:
        """Returns how much closer estimates are to the parts of mixtures than the mixture, in dB: sum and count."""
        heard_BS = targets_BST.any(2)
        counted_BS = heard_BS & (rows_B & (heard_BS.sum(1) > 1))[:, None]
        with full_precision(estimates_BST.device):
            lengths_B1 = batch.lengths_B[:, None]
            mixture_BST = batch.wave_BT.float()[:, None].expand_as(targets_BST)
            gained_BS = si_snr(estimates_BST, targets_BST, lengths_B1) - si_snr(mixture_BST, targets_BST, lengths_B1)
        return gained_BS.masked_fill(~counted_BS, 0.0).sum(), counted_BS.sum()


def first_mixture(batch: Batch, parts_BST: Tensor, estimates_BST: Tensor, rows_B: Tensor) -> HeadMedia | None:
    """Returns audio of the first mixture of a batch, its parts and their estimates; None where there is none."""
    if not bool(rows_B.any()):
        return None
    row = int(rows_B.int().argmax())
    length = int(batch.lengths_B[row])
    named = {"mixture": batch.wave_BT[row, :length]}
    for name, waves_ST in (("part", parts_BST[row]), ("estimate", estimates_BST[row])):
        named |= {f"{name}_{number}": wave_T[:length] for number, wave_T in enumerate(waves_ST, start=1)}
    return HeadMedia({}, named)


def magnitude_costs(masks_BSKC: Tensor, mixture_BKC: Tensor, sources_BSKC: Tensor) -> Tensor:
    """Returns the costs of each estimate for each source, (B, S, S), by phase-sensitive magnitudes.

    The target is the part of a source's spectrum in phase with the mixture, at least 0 and at most the mixture's
    magnitude; the cost is the sum of squared errors relative to the mixture's power (Kolbæk et al. 2017).
    Absolute errors have their minimum at the median: masks that know no speaker then become 1 and 0 everywhere, where
    sigmoids have no gradient.
    """
    magnitude_BKC = mixture_BKC.abs()
    products_BSKC = sources_BSKC.real * mixture_BKC.real[:, None] + sources_BSKC.imag * mixture_BKC.imag[:, None]
    in_phase_BSKC = products_BSKC / (magnitude_BKC[:, None] + EPS)
    targets_BSKC = torch.minimum(in_phase_BSKC.clamp(min=0), magnitude_BKC[:, None])
    estimates_BSKC = masks_BSKC * magnitude_BKC[:, None]
    # pair by pair: all of them at once would be S² spectrograms in memory
    pairs = [(estimates_BSKC - targets_BSKC[:, s, None]).square().sum((2, 3)) for s in range(targets_BSKC.shape[1])]
    return torch.stack(pairs, dim=2) / (magnitude_BKC.square().sum((1, 2)) + EPS)[:, None, None]


def magnitude_clustering(embedding_BKE: Tensor, mixture_BKC: Tensor, sources_BSKC: Tensor) -> Tensor:
    """Returns the deep clustering loss of each row, (B,), from magnitudes, by which bands are weighted."""
    bins = mixture_BKC.shape[2]
    units_BNE = F.normalize(embedding_BKE.reshape(len(embedding_BKE), -1, embedding_BKE.shape[2] // bins), dim=2)
    loudest_BKC = sources_BSKC.argmax(1)
    numbers_S = torch.arange(sources_BSKC.shape[1], device=loudest_BKC.device)
    shares_BNS = (loudest_BKC[..., None] == numbers_S).flatten(1, 2).float()
    weights_BN = mixture_BKC.flatten(1)
    return clustering_loss(units_BNE, shares_BNS, weights_BN / (weights_BN.sum(1, keepdim=True) + EPS))


def build(config: Config, shape: ModelShape) -> Separation:
    return Separation(config, shape)
