import importlib.util
import random
from pathlib import Path

import pytest

from clipcap.base.scenes import plan_scene

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('bundled', root / 'benchmarks' / 'bundled.py')
bundled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bundled)


@pytest.mark.parametrize(
    'captions, gender',
    [
        (['A woman runs', 'Two women run .', 'a girl is running'], 'woman'),
        (['A man runs', 'a boy runs'], 'man'),
        (['A man runs', 'somebody runs'], None),
        (['A man runs', 'a woman runs'], None),
        (['A man and a woman run'] * 5, None),
        (['A woman-sized human'], 'woman'),
        (['A human commands'], None),
    ],
)
def test_only_what_all_people_say_counts(captions, gender):
    assert bundled.agreed(captions) == gender


def test_what_a_model_says_has_four_cases():
    captions = dict(
        right='a woman sits', other='a man sits', both='a man and a girl', neither='a dog sits'
    )
    assert {case: bundled.said(text, 'woman') for case, text in captions.items()} == {
        case: case for case in captions
    }


def test_the_interval_of_a_share_is_wilsons():
    # Brown, Cai and DasGupta (2001): 0 of 10 has an upper end of z^2 / (n + z^2)
    low, high = bundled.interval(0, 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(1.96**2 / (10 + 1.96**2))
    assert sum(bundled.interval(5, 10)) == pytest.approx(1)


def test_a_scene_is_named_by_thing_and_colour_together():
    rng = random.Random('test')
    for _ in range(30):
        scene = plan_scene(rng)
        first = scene.things[0]
        text = f'there is a {first.colour} {first.thing} on the grass'
        assert bundled.names_rightly(scene, text)
        assert not bundled.names_rightly(scene, f'a {first.thing} beside something {first.colour}')
        assert not bundled.names_rightly(scene, 'a man is smiling')
