"""How wrong is an implicit hypergradient after so many products?

    python -m benchmarks.costs.solvers [--preset smoke|small] [--unknowns 200] [--seed 0]
        [--plot FILE] [--out FILE]

Each solver, cold, warm, damped and preconditioned, on a quadratic inner problem ½ θᵀHθ − bᵀθ with a penalty
for each unknown. H has a spectrum of condition number κ: spread evenly on a logarithmic scale, the hardest
for a Krylov method, or ten large eigenvalues above a bulk, as the Hessians of trained nets and of data with
a few strong directions have. The error is that of the hypergradient, relative to the closed form; products
are those of the solve and the one of its check and mixed term, preconditioners included, as
`out.report.products` counts them. Each point is a solve of its own, with ``max_steps`` set to its budget
and ``Checks(unsolved="warn")``.

*Warm* solves begin with the solution for hyperparameters that were 1 % away, as online tuning does. *Damped*
ones solve (H + δI) x = v, which is soon done and stays wrong. The *normal equations* HᵀH x = Hᵀv by conjugate
gradients square the condition number; two published libraries solve them by default.
"""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import autograd.numpy as np

import hypergrad as hg
from benchmarks.shared.report import save
from hypergrad.errors import SolveWarning

TARGET = 1e-4
PRESETS = {"smoke": ([10, 1e3], 60, 40), "small": ([10, 1e2, 1e3, 1e4, 1e5], 200, 4000)}
"""Condition numbers, unknowns, and the largest budget of products."""


@dataclass(frozen=True)
class Case:
    """One system: the problem at its optimum, and its hypergradient in closed form."""

    hessian: np.ndarray
    b: np.ndarray
    v: np.ndarray

    @classmethod
    def make(cls, kappa, spectrum, n, seed):
        rng = np.random.default_rng(seed)
        q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        if spectrum == "even":
            values = np.geomspace(1, 1 / kappa, n)
        else:
            values = np.concatenate([np.geomspace(1, 0.1, 10), rng.uniform(1, 2, n - 10) / kappa])
        return cls(q @ np.diag(values) @ q.T, *rng.normal(size=(2, n)))

    def optimum(self, penalties):
        return np.linalg.solve(self.hessian + np.diag(penalties), self.b)

    def exact(self, penalties):
        x = np.linalg.solve(self.hessian + np.diag(penalties), self.v)
        return -self.optimum(penalties) * x

    @property
    def problem(self):
        def inner(theta, penalties, batch):
            quadratic = 0.5 * theta @ (self.hessian @ theta) - self.b @ theta
            return quadratic + 0.5 * np.sum(penalties * theta**2)

        return hg.Bilevel(inner, lambda theta, penalties, batch: self.v @ theta)


def normal_equations(steps):
    """Conjugate gradients on HᵀH x = Hᵀv, two products a step."""

    def solve(matvec, v):
        x, r = np.zeros_like(v), matvec(v)
        p, rr = r, r @ r
        for _ in range(steps):
            hp = matvec(matvec(p))
            alpha = rr / (p @ hp)
            x, r = x + alpha * p, r - alpha * hp
            p, rr = r + (r @ r / rr) * p, r @ r
        return x

    return hg.External(solve)


def contenders(n, kappa):
    """Name -> (estimator for a budget of products, is it warm?)."""
    loose = {"checks": hg.Checks(away="ignore", unsolved="warn")}
    tight = 1e-13

    def cg(budget, preconditioner=None, wrap=lambda solver: solver):
        solver = hg.CG(budget, rtol=tight, preconditioner=preconditioner)
        return hg.Implicit(wrap(solver), **loose)

    rank = min(30, n // 2)
    sketch = hg.Nystrom(rank, damping=0.5 / kappa)
    return {
        "CG": (cg, False),
        "MINRES": (lambda k: hg.Implicit(hg.MINRES(k, rtol=tight), **loose), False),
        "GMRES": (lambda k: hg.Implicit(hg.GMRES(k, rtol=tight, restart=60), **loose), False),
        "BiCGStab": (lambda k: hg.Implicit(hg.BiCGStab(max(k, 2), rtol=tight), **loose), False),
        "Neumann": (lambda k: hg.Implicit(hg.Neumann(k, step_size=0.99), **loose), False),
        f"CG, Nyström {rank}": (lambda k: cg(max(k - rank, 1), sketch), False),
        "Nyström alone": (lambda k: hg.Implicit(hg.Nystrom(min(k, n), damping=0.5 / kappa), **loose), False),
        "CG, warm": (lambda k: cg(k, wrap=hg.Warm), True),
        f"CG, Nyström {rank}, warm": (lambda k: cg(max(k - rank, 1), sketch, wrap=hg.Warm), True),
        "CG, damped": (lambda k: cg(k, wrap=lambda solver: hg.Damped(solver, 10 / kappa)), False),
        "normal equations": (lambda k: hg.Implicit(normal_equations(max(k // 2, 1)), **loose), False),
    }


def curve(case, make, warm, penalties, budgets):
    """(products, error) for each budget, until the error is that of rounding."""
    exact, before = case.exact(penalties), penalties * 1.01
    points = []
    for budget in budgets:
        estimator = make(budget)
        state = estimator.init(case.problem, case.optimum(penalties), penalties)
        if warm:
            x = np.linalg.solve(case.hessian + np.diag(before), case.v)
            state = state._replace(memory=state.memory._replace(x=x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)
            out = estimator.estimate(case.problem, state, penalties, None, None)
        error = np.linalg.norm(out.hypergradient - exact) / np.linalg.norm(exact)
        points.append((int(out.report.products), float(error)))
        if error < 1e-9:
            break
    return points


def needed(points, error=TARGET):
    """The fewest products after which the error stays below."""
    fewest = None
    for products, found in reversed(points):
        if found > error:
            break
        fewest = products
    return fewest


def accurate(case, penalties, error):
    """Products when the hypergradient's own error says when to stop."""
    estimator = hg.Implicit(hg.UntilAccurate(hg.CG(100_000), error), checks=hg.Checks(away="ignore"))
    state = estimator.init(case.problem, case.optimum(penalties), penalties)
    out = estimator.estimate(case.problem, state, penalties, None, None)
    exact = case.exact(penalties)
    return int(out.report.products), float(np.linalg.norm(out.hypergradient - exact) / np.linalg.norm(exact))


def plot(path, rows):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kappas = sorted({row["kappa"] for row in rows})
    shown = [kappas[0], kappas[len(kappas) // 2], kappas[-1]] if len(kappas) > 2 else kappas
    spectra = list(dict.fromkeys(row["spectrum"] for row in rows))
    figure, axes = plt.subplots(
        len(spectra), len(shown), figsize=(4.2 * len(shown), 3.4 * len(spectra)), sharey=True, squeeze=False
    )
    for i, spectrum in enumerate(spectra):
        for j, kappa in enumerate(shown):
            ax = axes[i][j]
            for k, row in enumerate(r for r in rows if (r["spectrum"], r["kappa"]) == (spectrum, kappa)):
                products, errors = zip(*row["points"], strict=True)
                style = "--" if "warm" in row["solver"] else ":" if "Nyström" in row["solver"] else "-"
                ax.loglog(
                    products, errors, style, color="k" if k == 10 else f"C{k}", label=row["solver"], lw=1.5
                )
            ax.axhline(TARGET, color="0.8", lw=0.8, zorder=0)
            ax.set(title=f"κ = {kappa:,.0f}, {spectrum} spectrum", ylim=(1e-10, 10))
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("products with H")
    for row in axes:
        row[0].set_ylabel("relative error of the hypergradient")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--unknowns", type=int, help="n, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kappas, n, most = PRESETS[options.preset]
    n = options.unknowns or n
    budgets = sorted({int(round(k)) for k in np.geomspace(1, most, 60)})

    rows, told = [], []
    for spectrum in ("even", "outliers"):
        for kappa in kappas:
            case, penalties = Case.make(kappa, spectrum, n, options.seed), np.full(n, 0.1 / kappa)
            for name, (make, warm) in contenders(n, kappa).items():
                points = curve(case, make, warm, penalties, budgets)
                rows.append({"spectrum": spectrum, "kappa": kappa, "solver": name, "points": points})
            products, error = accurate(case, penalties, TARGET)
            told.append({"spectrum": spectrum, "kappa": kappa, "products": products, "error": error})

    for spectrum in ("even", "outliers"):
        print(f"products for a hypergradient right to {TARGET:g}, {n} unknowns, {spectrum} spectrum")
        print(f"{'κ':26}" + "".join(f"{kappa:>10g}" for kappa in kappas))
        for name in dict.fromkeys(row["solver"] for row in rows):
            counts = [
                needed(row["points"]) for row in rows if (row["solver"], row["spectrum"]) == (name, spectrum)
            ]
            print(f"{name:26}" + "".join(f"{'—' if c is None else c:>10}" for c in counts))
        mine = [row for row in told if row["spectrum"] == spectrum]
        print(f"{'CG, until accurate to 1e-4':26}" + "".join(f"{row['products']:>10}" for row in mine))
        print(f"{'  its true error':26}" + "".join(f"{row['error']:>10.0e}" for row in mine) + "\n")
    if options.out:
        about = {"unknowns": n, "seed": options.seed, "target": TARGET}
        save(options.out, about | {"rows": rows, "accuracy": told})
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
