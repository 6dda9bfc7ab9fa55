"""Captions for photos and videos: a vision tower, a mapper, a language model.

The names that most programs want are here; each is imported when it is first used, so that
`import clipcap` costs nothing. The rest is in the modules (`clipcap.image`, `clipcap.tools.recipe` ...).
"""

__version__ = "0.1.0"

from importlib import import_module

# written by hand: nbdev_export keeps the version above, and touches nothing else here
_HOMES = {
    'Candidate': 'image',
    'CaptionModel': 'model',
    'Captioner': 'image',
    'ClipcapError': 'base.files',
    'FeatureStore': 'base.store',
    'GenerationOptions': 'generate',
    'MapperConfig': 'model',
    'Recipe': 'tools.recipe',
    'VisionTower': 'embed',
    'embed_images': 'embed',
    'evaluate_captions': 'evaluate',
    'generate_captions': 'generate',
    'known_models': 'tools.published',
    'read_dataset': 'base.captions',
    'train_recipe': 'tools.recipe',
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'clipcap' has no attribute '{name}'")
    value = getattr(import_module(f'clipcap.{_HOMES[name]}'), name)
    globals()[name] = value  # found once
    return value


def __dir__():
    return sorted({*globals(), *__all__})
