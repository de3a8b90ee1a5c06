-- chain_of(previous, content): SHA-256 over two strings of 32 bytes each, as 32 bytes.
-- Redis offers no SHA-256. Together they are one block of 64 bytes, and a second block of padding
-- that is always the same: PADDING holds its message schedule, round constants added. The rounds are
-- unrolled by eight, so that no word changes its name: a third of the time goes without.
local band, bxor, ror, rshift = bit.band, bit.bxor, bit.ror, bit.rshift

local function compress(a0, b0, c0, d0, e0, f0, g0, h0, schedule)
  local a, b, c, d, e, f, g, h, t, both = a0, b0, c0, d0, e0, f0, g0, h0
  for i = 1, 64, 8 do
    t = h + bxor(ror(e, 6), ror(e, 11), ror(e, 25)) + g + band(e, f) - band(e, g) + schedule[i]
    both = band(a, b)
    d = (d + t) % 4294967296
    h = (t + bxor(ror(a, 2), ror(a, 13), ror(a, 22)) + both + band(c, a + b - 2 * both)) % 4294967296
    t = g + bxor(ror(d, 6), ror(d, 11), ror(d, 25)) + f + band(d, e) - band(d, f) + schedule[i + 1]
    both = band(h, a)
    c = (c + t) % 4294967296
    g = (t + bxor(ror(h, 2), ror(h, 13), ror(h, 22)) + both + band(b, h + a - 2 * both)) % 4294967296
    t = f + bxor(ror(c, 6), ror(c, 11), ror(c, 25)) + e + band(c, d) - band(c, e) + schedule[i + 2]
    both = band(g, h)
    b = (b + t) % 4294967296
    f = (t + bxor(ror(g, 2), ror(g, 13), ror(g, 22)) + both + band(a, g + h - 2 * both)) % 4294967296
    t = e + bxor(ror(b, 6), ror(b, 11), ror(b, 25)) + d + band(b, c) - band(b, d) + schedule[i + 3]
    both = band(f, g)
    a = (a + t) % 4294967296
    e = (t + bxor(ror(f, 2), ror(f, 13), ror(f, 22)) + both + band(h, f + g - 2 * both)) % 4294967296
    t = d + bxor(ror(a, 6), ror(a, 11), ror(a, 25)) + c + band(a, b) - band(a, c) + schedule[i + 4]
    both = band(e, f)
    h = (h + t) % 4294967296
    d = (t + bxor(ror(e, 2), ror(e, 13), ror(e, 22)) + both + band(g, e + f - 2 * both)) % 4294967296
    t = c + bxor(ror(h, 6), ror(h, 11), ror(h, 25)) + b + band(h, a) - band(h, b) + schedule[i + 5]
    both = band(d, e)
    g = (g + t) % 4294967296
    c = (t + bxor(ror(d, 2), ror(d, 13), ror(d, 22)) + both + band(f, d + e - 2 * both)) % 4294967296
    t = b + bxor(ror(g, 6), ror(g, 11), ror(g, 25)) + a + band(g, h) - band(g, a) + schedule[i + 6]
    both = band(c, d)
    f = (f + t) % 4294967296
    b = (t + bxor(ror(c, 2), ror(c, 13), ror(c, 22)) + both + band(e, c + d - 2 * both)) % 4294967296
    t = a + bxor(ror(f, 6), ror(f, 11), ror(f, 25)) + h + band(f, g) - band(f, h) + schedule[i + 7]
    both = band(b, c)
    e = (e + t) % 4294967296
    a = (t + bxor(ror(b, 2), ror(b, 13), ror(b, 22)) + both + band(d, b + c - 2 * both)) % 4294967296
  end
  return (a0 + a) % 4294967296, (b0 + b) % 4294967296, (c0 + c) % 4294967296, (d0 + d) % 4294967296,
    (e0 + e) % 4294967296, (f0 + f) % 4294967296, (g0 + g) % 4294967296, (h0 + h) % 4294967296
end

local function chain_of(previous, content)
  local K = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
  }
  local PADDING = {
    0xc28a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf374,
    0x649b69c1, 0xf0fe4786, 0x0fe1edc6, 0x240cf254, 0x4fe9346f, 0x6cc984be, 0x61b9411e, 0x16f988fa,
    0xf2c65152, 0xa88e5a6d, 0xb019fc65, 0xb9d99ec7, 0x9a1231c3, 0xe70eeaa0, 0xfdb1232b, 0xc7353eb0,
    0x3069bad5, 0xcb976d5f, 0x5a0f118f, 0xdc1eeefd, 0x0a35b689, 0xde0b7a04, 0x58f4ca9d, 0xe15d5b16,
    0x007f3e86, 0x37088980, 0xa507ea32, 0x6fab9537, 0x17406110, 0x0d8cd6f1, 0xcdaa3b6d, 0xc0bbbe37,
    0x83613bda, 0xdb48a363, 0x0b02e931, 0x6fd15ca7, 0x521afaca, 0x31338431, 0x6ed41a95, 0x6d437890,
    0xc39c91f2, 0x9eccabbd, 0xb5c9a0e6, 0x532fb63c, 0xd2c741c6, 0x07237ea3, 0xa4954b68, 0x4c191d76,
  }
  local words = { struct.unpack('>I4I4I4I4I4I4I4I4I4I4I4I4I4I4I4I4', previous .. content) }
  for i = 17, 64 do
    local x, y = words[i - 15], words[i - 2]
    words[i] = (words[i - 16] + bxor(ror(x, 7), ror(x, 18), rshift(x, 3))
      + words[i - 7] + bxor(ror(y, 17), ror(y, 19), rshift(y, 10))) % 4294967296
  end
  for i = 1, 64 do
    words[i] = words[i] + K[i]
  end
  local a, b, c, d, e, f, g, h = compress(1779033703, 3144134277, 1013904242, 2773480762,
    1359893119, 2600822924, 528734635, 1541459225, words)
  return struct.pack('>I4I4I4I4I4I4I4I4', compress(a, b, c, d, e, f, g, h, PADDING))
end
