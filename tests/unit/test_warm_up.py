from tidemill.worker.warm_up import kinds_of_rows


def test_every_kind_of_step_is_computed_once_before_serving() -> None:
    """One row, either side of each tile's bound, divided by 16 or not, and a full step."""
    rows = kinds_of_rows(300)
    assert rows == [1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 300]
    assert kinds_of_rows(1) == [1]
    for tile in (16, 32, 64, 128, 256):
        assert {True, False} == {
            count % 16 == 0 for count in rows if tile // 2 < count <= tile and count > 8
        }
