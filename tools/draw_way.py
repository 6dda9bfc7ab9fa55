"""Draw the way of the data, from a photo to its caption: the picture that the README shows.

python tools/draw_way.py     writes nbs/images/way.png
"""

import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from clipcap.base.scenes import draw_scene

root = Path(__file__).resolve().parent.parent
INK, FROZEN, LEARNED = '#20304a', '#dbe6f3', '#ffe2b8'


def draw_box(axis, left, width, title, note, fill):
    "A part of the captioner"
    shape = FancyBboxPatch(
        (left, 0.32), width, 1.0, boxstyle='round,pad=0.02,rounding_size=.12', fc=fill, ec=INK
    )
    axis.add_patch(shape)
    middle = left + width / 2
    axis.text(middle, 0.9, title, ha='center', va='center', fontsize=11, color=INK, weight='bold')
    axis.text(middle, 0.56, note, ha='center', va='center', fontsize=10, color=INK)


def draw_arrow(axis, start, end):
    style = dict(arrowstyle='-|>', color=INK, lw=1.6)
    axis.annotate('', (end, 0.82), (start, 0.82), arrowprops=style)


def draw_numbers(axis, left, rows, columns, size, title):
    "A small table of numbers as coloured squares"
    values = np.random.default_rng(rows).standard_normal((rows, columns))
    right, half = left + columns * size, rows * size / 2
    extent = (left, right, 0.82 - half, 0.82 + half)
    axis.imshow(values, cmap='RdBu', vmin=-2.5, vmax=2.5, extent=extent, aspect='auto')
    axis.text((left + right) / 2, 0.1, title, ha='center', fontsize=10, color=INK)
    return right


def main():
    scene, _ = draw_scene(random.Random('way-4'), 256)  # four yellow boxes in a field
    figure, axis = plt.subplots(figsize=(11.4, 1.75), dpi=110)
    axis.imshow(scene, extent=(0, 1.2, 0.22, 1.42), aspect='auto')
    axis.text(0.6, 0.06, 'photo', ha='center', fontsize=10, color=INK)
    draw_arrow(axis, 1.25, 1.55)
    draw_box(axis, 1.6, 1.5, 'vision tower', 'frozen', FROZEN)
    draw_arrow(axis, 3.15, 3.45)
    end = draw_numbers(axis, 3.5, 1, 7, 0.1, 'feature')
    draw_arrow(axis, end + 0.05, end + 0.35)
    draw_box(axis, end + 0.4, 1.1, 'mapper', 'learned', LEARNED)
    draw_arrow(axis, end + 1.55, end + 1.85)
    end = draw_numbers(axis, end + 1.9, 5, 7, 0.1, 'prefix')
    draw_arrow(axis, end + 0.05, end + 0.35)
    draw_box(axis, end + 0.4, 1.8, 'language model', 'frozen or tuned', FROZEN)
    draw_arrow(axis, end + 2.25, end + 2.55)
    caption = 'four yellow boxes\nin a field'
    axis.text(end + 2.62, 0.82, f'“{caption}”', va='center', fontsize=12, color=INK, style='italic')
    axis.set(xlim=(-0.05, end + 4.1), ylim=(0, 1.5))
    axis.set_aspect('equal')
    axis.axis('off')
    file = root / 'nbs' / 'images' / 'way.png'
    figure.savefig(file, bbox_inches='tight', pad_inches=0.05)
    print(file)


if __name__ == '__main__':
    main()
