"""The tenant of a job's name."""

from __future__ import annotations

import pytest

from hetrain.public.errors import UsageError
from hetrain.public.protocol.tenants import new_job


def test_a_tenant_is_sixteen_hexadecimal_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETRAIN_TENANT", "0123456789abcdef")
    first, second = new_job(), new_job()
    assert first != second
    assert first[:16] == second[:16] == "0123456789abcdef"
    assert len(first) == 48
    for bad in ("0123456789abcde", "0123456789ABCDEF", "0123456789abcdef0", "*" * 16, "0123456789abcdef\n"):
        monkeypatch.setenv("HETRAIN_TENANT", bad)
        with pytest.raises(UsageError, match="no tenant"):
            new_job()
    monkeypatch.delenv("HETRAIN_TENANT")
    assert len(new_job()) == 32
