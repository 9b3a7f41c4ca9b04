"""Flow matching: paths and Euler's method against closed forms, and a decoder that learns a distribution."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.models.synthesis.flow import SIGMA, FlowConfig, FlowDecoder, drawn, integrate, path


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    rng = np.random.default_rng(0)
    noise, data = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    for time in (0.0, 0.3, 1.0):
        later, earlier = ((1 - (1 - SIGMA) * t) * noise + t * data for t in (time + 1e-6, time - 1e-6))  # in NumPy
        point, velocity = path(torch.from_numpy(noise), torch.from_numpy(data), torch.tensor(time, dtype=torch.float64))
        np.testing.assert_allclose(velocity.numpy(), (later - earlier) / 2e-6, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(point.numpy(), (later + earlier) / 2, rtol=1e-7, atol=1e-8)


def test_integration_of_the_closed_form_velocity_gives_the_data() -> None:
    """Data from N(m, s²): x_t has deviation √(a² + t² s²), a = 1 − (1 − σ) t, and E[velocity | x_t] is linear."""
    m, s = 2.0, 0.5

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        a = 1 - (1 - SIGMA) * t
        slope = (t * s**2 - (1 - SIGMA) * a) / (a**2 + t**2 * s**2)
        return m + slope * (x - t * m)

    noise = torch.linspace(-3, 3, 41, dtype=torch.float64)
    exact = m + s * noise  # the flow maps quantiles to quantiles
    errors = [float((integrate(velocity, noise, steps) - exact).abs().max()) for steps in (10, 100, 1_000)]
    assert errors[2] < 5e-3
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # first order


def test_draws_of_a_row_do_not_depend_on_others_or_on_padding() -> None:
    def rngs(*seeds: int) -> list[np.random.Generator]:
        return [np.random.default_rng(seed) for seed in seeds]

    both, alone = drawn(rngs(1, 2), [5, 3], 7, 4), drawn(rngs(2), [3], 3, 4)
    torch.testing.assert_close(both.noise_BFM[1:, :3], alone.noise_BFM, rtol=0, atol=0)
    assert both.time_B[1] == alone.time_B[0]
    assert not both.noise_BFM[1, 3:].any()


def test_a_decoder_learns_both_of_two_answers_where_l1_gives_one() -> None:
    torch.manual_seed(0)
    decoder = FlowDecoder(FlowConfig(layers=2, inner=32), 16, 8)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    text_BFD, median_BFM = torch.zeros(32, 6, 16), torch.zeros(32, 6, 8)
    valid_BF = torch.ones(32, 6, dtype=torch.bool)
    sign_B11 = torch.tensor([1.0, -1.0]).repeat(16)[:, None, None]  # each text is spoken in one of two ways
    for step in range(250):
        draws = drawn([np.random.default_rng([step, row]) for row in range(32)], [6] * 32, 6, 8)
        loss = decoder.loss(draws, sign_B11.expand(-1, 6, 8), text_BFD, median_BFM, valid_BF).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = drawn([np.random.default_rng([7, row]) for row in range(32)], [6] * 32, 6, 8).noise_BFM
    with torch.inference_mode():
        found_B = decoder.speak(noise, text_BFD, median_BFM, valid_BF, 10).mean((1, 2))
    assert (found_B.abs() > 0.7).float().mean() > 0.7
    assert 8 <= int((found_B > 0).sum()) <= 24
