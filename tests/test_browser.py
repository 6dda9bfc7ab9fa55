"Widgets in JupyterLab, driven in headless Chromium with a camera made of a file"
import pytest
from browser import opened

pytestmark = pytest.mark.browser

def test_a_notebook_runs(lab):
    with opened(lab, ['import ipywidgets\nipywidgets.HTML("<b class=hello>here</b>")']) as page:
        assert page.wait_for_selector('.hello').inner_text() == 'here'
