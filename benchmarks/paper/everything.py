"""All figures and the overhead, one after another, with the options of each: see README.md.

python -m benchmarks.paper.everything [--preset smoke|small|paper] [--data FOLDER] [--draw]
"""

from benchmarks.paper import fig1, fig2, fig3, fig4, fig5, fig6, fig7, overhead


def main() -> None:
    for script in (fig4, fig5, fig6, fig3, fig2, fig1, fig7, overhead):
        script.main()


if __name__ == "__main__":
    main()
