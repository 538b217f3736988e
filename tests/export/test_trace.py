"""What tracing itself refuses; what it gives is held by the tests of ``convert``."""

import pytest

torch = pytest.importorskip("torch")

from segcli.errors import ExportError
from segcli.export.trace import trace

pytestmark = pytest.mark.export


def test_a_module_that_cannot_be_traced_is_an_export_error():
    class Strange(torch.nn.Module):
        def forward(self, x):
            raise ValueError("nothing to see")

    with pytest.raises(ExportError, match="could not trace Strange"):
        trace(Strange().eval())
