"""Writes ten days of a shop's clicks as CSV files with string ids, and an eleventh day that waits for its scores.

python examples/own_data/shop_clicks.py shop
"""

import csv
import sys
from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from random import Random

HEADER = ["user", "item", "country", "price", "age", "viewed", "at", "clicked"]
DAYS, ROWS_OF_DAY, USERS, ITEMS, TASTES = 11, 2000, 600, 150, 4
COUNTRIES = ("DE", "FR", "PL", "SE", "")  # the last one is missing


def chance(user: int, item: int, price: float) -> float:
    """Returns the true probability of a click: of the user's taste, the item, and the price."""
    liked = 2.5 if user % TASTES == item % TASTES else 0.0
    return 1 / (1 + exp(1.0 - liked - (item * 37 % 11 - 5) / 5 + log(price / 20)))


def days() -> Iterator[tuple[str, list[list[str]], list[float]]]:
    """Yields each day's date, its rows, and their true probabilities."""
    random, viewed = Random(27), dict[int, list[str]]()
    for day in range(1, DAYS + 1):
        rows, chances = [], []
        for i in range(ROWS_OF_DAY):
            user, item = int(USERS * random.random() ** 2), int(ITEMS * random.random() ** 2)
            price, age = round(5 + 95 * random.random() ** 2, 2), 18 + user * 7 % 60
            of_user = viewed.setdefault(user, [])
            chances.append(chance(user, item, price))
            clicked = "?" if i == 700 else str(int(random.random() < chances[-1]))  # one line a day has no good label
            at = f"2026-11-{day:02} {8 + i // 150:02}:{i // 3 % 60:02}:{i % 60:02}"
            country, years = COUNTRIES[user % 5], "" if user % 10 == 3 else str(age)
            rows.append(
                [f"u_{user:04}", f"sku-{item:03}", country, f"{price:.2f}", years, "|".join(of_user), at, clicked]
            )
            if user % TASTES == item % TASTES:
                viewed[user] = [*of_user, f"sku-{item:03}"][-5:]
        yield f"2026-11-{day:02}", rows, chances


def main(folder: Path) -> None:
    """Writes clicks/<day>.csv of ten days, and new.csv, whose rows have no label yet."""
    (folder / "clicks").mkdir(parents=True, exist_ok=True)
    *past, (_, new, _) = days()
    files = {f"clicks/{day}.csv": [HEADER, *rows] for day, rows, _ in past}
    for name, lines in {**files, "new.csv": [row[:-1] for row in (HEADER, *new)]}.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
