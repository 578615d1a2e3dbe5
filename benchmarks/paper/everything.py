"""All figures and the overhead, one after another, with the options of each: see README.md.

python benchmarks/paper/everything.py [--preset smoke|small|paper] [--data FOLDER] [--draw]
"""

import fig1
import fig2
import fig3
import fig4
import fig5
import fig6
import fig7
import overhead


def main() -> None:
    for script in (fig4, fig5, fig6, fig3, fig2, fig1, fig7, overhead):
        script.main()


if __name__ == "__main__":
    main()
