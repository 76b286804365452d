"""How faults of the library are put under the claims."""

import pytest


@pytest.fixture
def patched(monkeypatch, claim_modules):
    """Replaces a function that the claims call, and forgets what was compiled or measured with another one.

    Each file of tests says in a fixture ``claim_modules`` which modules hold its claims. The function is replaced in
    all of them that know it, or in the modules given.
    """

    def forget():
        for member in (m for module in claim_modules for m in vars(module).values()):
            for clear in ("clear_cache", "cache_clear"):
                getattr(member, clear, lambda: None)()

    def patch(name, replacement, modules=None):
        for module in modules or [m for m in claim_modules if hasattr(m, name)]:
            monkeypatch.setattr(module, name, replacement)
        forget()

    yield patch
    monkeypatch.undo()
    forget()
