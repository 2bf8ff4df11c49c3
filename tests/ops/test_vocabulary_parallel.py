"""A vocabulary divided between processes gives what one process gives."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp

from support.vocabulary_parallel import outputs, work


@pytest.mark.parametrize("size", [2, 4])
def test_shares_agree_with_the_whole(size, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (size, port, str(tmp_path)), nprocs=size)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    whole = outputs(0, 1, None)
    for name, expected in whole.items():
        if name.endswith(("d_weight", "d_bias")):
            found = torch.cat([share[name] for share in shares])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=name)
        else:
            for share in shares:
                torch.testing.assert_close(share[name], expected, atol=1e-5, rtol=1e-4, msg=name)
