"""How the command line of the experiments must fail."""

import pytest

from experiments.__main__ import main


@pytest.fixture
def fails(capsys, tmp_path):
    """The message of a command line, which must exit with status 2 and leave no run behind."""

    def run(argv) -> str:
        runs = tmp_path / "runs"
        try:
            status = main([*argv, "--runs-root", str(runs)])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert not runs.exists()
        return capsys.readouterr().err

    return run
