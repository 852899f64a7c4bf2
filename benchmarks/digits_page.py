"""stub"""


def write_figures(cells, order):
    pass


def write_page(cells, order):
    return ""
